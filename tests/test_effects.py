"""Effects of swept settings: each value's mean and interval, its share, and the edge of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.reporting.effects import find_edges, find_effects
from finetune.reporting.results import read_results
from finetune.tracking.sweep_record import RunRecord, SweepRecord
from tests.test_results import ACC, write_run

BASE = [0.0, 1.0] * 20


def write_grid(root: Path, swept: dict[str, list[str]], right: Sequence[int]) -> Path:
    """Write a grid whose runs answer so many of the base's wrong questions right."""
    places: list[dict[str, str]] = [{}]
    for key, values in swept.items():
        places = [{**place, key: value} for place in places for value in values]
    records = []
    for number, (place, count) in enumerate(zip(places, right, strict=True)):
        tuned = [1.0 if n < 2 * count else value for n, value in enumerate(BASE)]
        write_run(root / f"run-{number}", {"arc": {"acc": (ACC, BASE, tuned)}})
        records.append(RunRecord(f"../run-{number}", place))
    folder = root / "sweep"
    folder.mkdir()
    SweepRecord("sweep", [], list(swept), ["arc"], records).write(folder)
    return folder


def test_a_values_effect_is_the_mean_of_its_runs(tmp_path: Path) -> None:
    """The setting that moves the score most comes first, with its share of the variance."""
    swept = {"lora.r": ["4", "8"], "optimizer.lr": ["1e-4", "1e-3"]}
    results = read_results(write_grid(tmp_path, swept, [2, 10, 4, 12]))
    first, second = find_effects(results)
    assert (first.key, second.key) == ("optimizer.lr", "lora.r")
    assert [value.mean for value in first.values] == pytest.approx([0.575, 0.775])
    assert [effect.share for effect in (first, second)] == pytest.approx([16 / 17, 1 / 17])
    low, high = first.values[1].low, first.values[1].high
    assert low is not None
    assert high is not None
    assert low < 0.275 < high


def test_equal_runs_have_no_share(tmp_path: Path) -> None:
    """No setting explains a difference that is not there."""
    results = read_results(write_grid(tmp_path, {"lora.r": ["4", "8"]}, [3, 3]))
    assert [effect.share for effect in find_effects(results)] == [None]


@pytest.mark.parametrize(
    ("values", "right", "said"),
    [
        (
            ["4", "8", "16"],
            [1, 2, 3],
            "16, is the highest that was tried: try 32.",
        ),
        (["4", "8", "16"], [3, 2, 1], "4, is the lowest that was tried: try 2."),
        (["4", "8", "16"], [1, 3, 2], ""),
        (["4", "8"], [1, 2], ""),
        (["a", "b", "c"], [1, 2, 3], ""),
        (["4", "8", "16"], [1, 3, 3], ""),
        (["0", "4", "8"], [1, 3, 2], ""),
        (["0", "4", "8"], [1, 2, 3], "8, is the highest that was tried: try 16."),
        (["0", "4", "8"], [3, 2, 1], ""),
    ],
)
def test_a_best_value_at_the_edge_is_named(
    tmp_path: Path, values: list[str], right: list[int], said: str
) -> None:
    """With the next one to try; a tie, two values or words have no edge."""
    results = read_results(write_grid(tmp_path, {"lora.r": values}, right))
    assert find_edges(results) == ([f"The best lora.r, {said}"] if said else [])


def test_a_seed_has_no_edge(tmp_path: Path) -> None:
    """Its numbers have no order."""
    results = read_results(write_grid(tmp_path, {"training.seed": ["1", "2", "3"]}, [1, 2, 3]))
    assert find_edges(results) == []
