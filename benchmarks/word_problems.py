"""Word problems in the shape of GSM8K's rows, with their solutions, made from a seed."""

from __future__ import annotations

import random

NAMES = ("Ada", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas")
THINGS = ("apples", "pencils", "stamps", "marbles", "books", "tickets", "shells", "candles")


def make_problems(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of question and answer; the answer ends with `#### NUMBER`."""
    draw = random.Random(seed)
    return [draw.choice((_sold, _travelled, _shared))(draw) for _ in range(number)]


def _sold(draw: random.Random) -> dict[str, str]:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    boxes, each, kept, price = (draw.randint(3, 12) for _ in range(4))
    total, sold = boxes * each, boxes * each - kept
    return {
        "question": f"{name} packs {thing} for the market. There are {boxes} boxes with {each} "
        f"{thing} in each. {name} keeps {kept} {thing} for a friend and sells all the others for "
        f"${price} each. How many dollars does {name} earn at the market?",
        "answer": f"In the boxes there are {boxes} * {each} = <<{boxes}*{each}={total}>>{total} "
        f"{thing}.\n{name} sells {total} - {kept} = <<{total}-{kept}={sold}>>{sold} {thing}.\n"
        f"They bring {sold} * {price} = $<<{sold}*{price}={sold * price}>>{sold * price}.\n"
        f"#### {sold * price}",
    }


def _travelled(draw: random.Random) -> dict[str, str]:
    name = draw.choice(NAMES)
    hours, speed, walked = draw.randint(2, 6), draw.randint(20, 60), draw.randint(2, 9)
    ridden = hours * speed
    return {
        "question": f"{name} visits an aunt who lives far away. The bus goes at {speed} miles an "
        f"hour and takes {hours} hours. From the station {name} walks another {walked} miles to "
        f"the house, and takes the same way back a week later. How many miles does {name} travel "
        "in all?",
        "answer": f"The bus goes {hours} * {speed} = <<{hours}*{speed}={ridden}>>{ridden} miles.\n"
        f"With the walk it is {ridden} + {walked} = <<{ridden}+{walked}={ridden + walked}>>"
        f"{ridden + walked} miles one way.\nThere and back it is {ridden + walked} * 2 = "
        f"<<{ridden + walked}*2={2 * (ridden + walked)}>>{2 * (ridden + walked)} miles.\n"
        f"#### {2 * (ridden + walked)}",
    }


def _shared(draw: random.Random) -> dict[str, str]:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    children, each, left = draw.randint(3, 9), draw.randint(4, 15), draw.randint(1, 9)
    given = children * each
    return {
        "question": f"{name} collects {thing} and wants to give most of them away. Each of "
        f"{children} children gets {each} {thing}, and then {left} {thing} are left over. How "
        f"many {thing} did {name} have at the beginning?",
        "answer": f"The children get {children} * {each} = <<{children}*{each}={given}>>{given} "
        f"{thing}.\nAt the beginning there were {given} + {left} = "
        f"<<{given}+{left}={given + left}>>{given + left} {thing}.\n#### {given + left}",
    }
