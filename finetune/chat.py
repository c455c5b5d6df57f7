"""Chat with trained runs and their base model: `python -m finetune.chat RUN [RUN ...]`.

Answers go to standard output and everything else to standard error, so that prompts can be piped
in and answers piped out.
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
from finetune.tracking.run_names import find_run

if TYPE_CHECKING:
    from finetune.inference.conversation import Conversation, Sampling

HELP = """\
Each line is a prompt, rendered with the template that the run was trained with. Where a template
has several fields, write a line FIELD: VALUE for each.
/use NAME   switch to another run (a part of its name is enough), or to base, the base model
/list       list the runs; * marks the one that answers
/reset      clear the conversation
/help       show this help
/quit       exit, as Ctrl-D does; Ctrl-C stops an answer"""


def main() -> None:
    """Chat on the terminal or through a pipe; exit code 0, or 2 where no run can be loaded."""
    keep_streams()
    parser = argparse.ArgumentParser(
        prog="python -m finetune.chat", description=__doc__, epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "runs", nargs="+", type=find_run, help="runs' folders, outputs/NAME, or their ids"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="longest answer, tokens (256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: greedy decoding (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow the Python code of a base model trained with model.trust_remote_code=true",
    )
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature is {args.temperature}; it must be at least 0")
    if not 0 <= args.seed <= LARGEST_SEED:
        parser.error(f"--seed is {args.seed}; it must be from 0 to {LARGEST_SEED}")
    # Only now, so that help and mistakes come at once.
    from finetune.logs import quieten_libraries

    quieten_libraries()
    from transformers import set_seed

    from finetune.inference import conversation, trained

    try:
        runs = [
            trained.find_trained(path, trusts_remote_code=args.trust_remote_code)
            for path in dict.fromkeys(args.runs)
        ]
        loaded = conversation.load(runs)
        set_seed(args.seed)
        sampling = conversation.Sampling(args.max_new_tokens, args.temperature)
        talk(loaded, sampling, read_lines())
    except Refused as refused:
        notify(str(refused))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def notify(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_lines() -> Iterator[str]:
    """Yield lines from the terminal or a pipe until the end of input."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # arrow keys and history, by being imported

    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except KeyboardInterrupt:  # forgets the line, as a shell does
            notify("")
        except EOFError:
            notify("")
            return


def talk(conversation: Conversation, sampling: Sampling, lines: Iterable[str]) -> None:
    """Answer line by line until /quit or the end, or until nobody reads the answers."""
    print_model(conversation)
    for line in lines:
        if is_gone(sys.stdout):
            return
        if not line.strip():
            continue
        if line.startswith("/"):
            if line.strip() == "/quit":
                return
            run_command(conversation, *line.split(maxsplit=1))
        else:
            print_answer(conversation, sampling, line)


def print_model(conversation: Conversation) -> None:
    """Print which model answers, its prompt template, and the fields to fill in."""
    voice = conversation.voice
    model = "the base model" if conversation.is_base else voice.name
    notify(f"{model} answers, prompt template {Path(voice.prompt).name}; /help lists commands")
    if len(voice.fields) > 1:
        notify(f"write a line FIELD: VALUE for each field: {', '.join(voice.fields)}")


def run_command(conversation: Conversation, command: str, argument: str = "") -> None:
    """Run a command, a line that starts with a slash."""
    match command:
        case "/use":
            try:
                conversation.use(argument.strip())
            except ValueError as error:
                notify(str(error))
            else:
                print_model(conversation)
        case "/list":
            for voice in conversation.voices:
                now = voice == conversation.voice and not conversation.is_base
                prompt = Path(voice.prompt).name
                notify(f"{'*' if now else ' '} {voice.name} ({voice.method}, {prompt})")
            notify(f"{'*' if conversation.is_base else ' '} base")
        case "/reset":
            conversation.reset()
            notify("conversation cleared")
        case "/help":
            notify(HELP)
        case _:
            notify(f"{command} is not a command; /help lists them")


def print_answer(conversation: Conversation, sampling: Sampling, line: str) -> None:
    """Stream the answer to a prompt, or print why there is none."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        if conversation.answer(line, sampling, write) is not None:
            print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        notify("(stopped)")
    except ValueError as fault:  # Unusable
        notify(str(fault))


if __name__ == "__main__":
    main()
