"""`python -m finetune.chat RUN [RUN ...]`: talk with what runs trained, and with their base.

Answers go to the standard output and all else to the standard error, so that a pipe of lines
comes out as answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.rules import LARGEST_SEED
from finetune.problems import Refused
from finetune.streams import is_gone, keep_streams

if TYPE_CHECKING:
    from finetune.inference.conversation import Conversation, Sampling

HELP = """\
A line is asked as the run was trained: as an instruction, in a chat, as the beginning of a text,
or by the run's own template, whose fields are given as FIELD: VALUE where it has several.
/use NAME   let another run answer, by a part of its name; /use base for the base alone
/list       the runs, and who answers now
/reset      forget the conversation
/help       this
/quit       leave, as Ctrl-D does; Ctrl-C stops an answer"""


def main() -> None:
    """Talk on the terminal or through a pipe; exit code 0, or 2 where there is nothing to load."""
    keep_streams()
    parser = argparse.ArgumentParser(
        prog="python -m finetune.chat", description=__doc__, epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, help="runs' folders, outputs/NAME")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="of an answer, at most (256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what a temperature draws (0)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that a run's model brings along, where the run did",
    )
    given = parser.parse_args()
    if given.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {given.max_new_tokens}; it must be at least 1")
    if not 0 <= given.temperature < float("inf"):
        parser.error(f"--temperature is {given.temperature}; it must be at least 0")
    if not 0 <= given.seed <= LARGEST_SEED:
        parser.error(f"--seed is {given.seed}; it must be from 0 to {LARGEST_SEED}")
    # Only now, so that help and mistakes come at once.
    from finetune.logs import quieten_libraries

    quieten_libraries()
    from transformers import set_seed

    from finetune.inference import conversation, trained

    try:
        runs = [
            trained.find_trained(path, trusts_remote_code=given.trust_remote_code)
            for path in dict.fromkeys(given.runs)
        ]
        loaded = conversation.load(runs)
        set_seed(given.seed)
        sampling = conversation.Sampling(given.max_new_tokens, given.temperature)
        talk(loaded, sampling, read_lines())
    except Refused as refused:
        tell(str(refused))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_lines() -> Iterator[str]:
    """Yield what is typed, or what comes through a pipe, until its end."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # arrow keys and history, by being imported

    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except KeyboardInterrupt:  # forgets the line, as a shell does
            tell("")
        except EOFError:
            tell("")
            return


def talk(conversation: Conversation, sampling: Sampling, lines: Iterable[str]) -> None:
    """Answer line by line until /quit or the end, or until nobody reads the answers."""
    introduce(conversation)
    for line in lines:
        if is_gone(sys.stdout):
            return
        if not line.strip():
            continue
        if line.startswith("/"):
            if line.strip() == "/quit":
                return
            obey(conversation, *line.split(maxsplit=1))
        else:
            say(conversation, sampling, line)


def introduce(conversation: Conversation) -> None:
    """Tell who answers, and what is asked for."""
    voice = conversation.voice
    who = "the base" if conversation.is_base else voice.name
    tell(f"{who} answers, asked by {Path(voice.prompt).name}; /help for commands")
    if len(voice.fields) > 1:
        tell(f"it needs {', '.join(voice.fields)}: a line FIELD: VALUE for each")


def obey(conversation: Conversation, command: str, argument: str = "") -> None:
    """Do what a line with a slash asks for."""
    match command:
        case "/use":
            try:
                conversation.use(argument.strip())
            except ValueError as error:
                tell(str(error))
            else:
                introduce(conversation)
        case "/list":
            for voice in conversation.voices:
                now = voice == conversation.voice and not conversation.is_base
                prompt = Path(voice.prompt).name
                tell(f"{'*' if now else ' '} {voice.name} ({voice.method}, {prompt})")
            tell(f"{'*' if conversation.is_base else ' '} base")
        case "/reset":
            conversation.reset()
            tell("forgotten")
        case "/help":
            tell(HELP)
        case _:
            tell(f"there is no {command}; /help lists what there is")


def say(conversation: Conversation, sampling: Sampling, line: str) -> None:
    """Print the answer to a line as it comes, or why there is none."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        if conversation.answer(line, sampling, write) is not None:
            print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        tell("(stopped)")
    except ValueError as fault:  # Unusable
        tell(str(fault))


if __name__ == "__main__":
    main()
