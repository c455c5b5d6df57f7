"""List, compare, watch or remove runs: `python -m finetune.runs [RUN ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.config.schema import Config
from finetune.confirmation import confirm, require_answer
from finetune.escaping import for_terminal
from finetune.files import folder_size
from finetune.problems import Refused
from finetune.reporting.results import find_damage
from finetune.reporting.run_list import (
    ListedRun,
    choose,
    find_shared,
    render_list,
    sort_runs,
)
from finetune.reporting.run_pair import render_pair, render_settings
from finetune.reporting.tables import output_width, print_table, print_text, show_size
from finetune.streams import keep_streams
from finetune.sweeps.live import LOST, FindRuns
from finetune.sweeps.watching import find_sweep, runs_of_folder, runs_of_sweep, watch
from finetune.tracking import run_removal
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.run_names import find_run

DESCRIPTION = """\
List runs with their state, progress, worker, settings and scores; compare two of
them: the settings that differ, and their scores on the same questions; watch a
sweep from a second terminal, whichever machines run it; or remove runs.

RUN is a run's folder, its name, or the beginning of the id at the end of its
name. KEY is a column of the list (run, state, step, loss, worker, host, started,
ended), a metric or a setting; the end of its name is enough: acc, lr.

States: waiting, running, trained (waits for its score), scoring, finished,
failed, diverged, interrupted, and lost: nobody works on the run any longer, since
its process has ended on this machine, or has not renewed its claim for 90 s under
--watch. The command that made a run resumes it. --watch ends when all runs are
finished, failed or diverged, or at Ctrl-C, with exit code 0; where the output is
no terminal it prints a line for each change."""
EXAMPLES = """\
examples:
  python -m finetune.runs --filter state=failed,lost --filter lora.r=16
  python -m finetune.runs --sort acc --reverse
  python -m finetune.runs 3b7a11 d03b13
  python -m finetune.runs 3b7a11 --remove"""


def main() -> None:
    """List, compare, watch or remove runs; exit code 2 where there is none, or it is refused."""
    keep_streams()
    args = build_parser().parse_args()
    outputs = args.outputs or Path(Config.output_dir)
    try:
        refuse_clash(args)
        named = [RunFolder(find_run(one, outputs)) for one in args.runs]
        if args.watch is not None:
            watch(find_watched(args.watch, args.outputs))
        elif args.remove:
            chosen = named or (choose_runs(outputs, args) if args.filter else [])
            sys.exit(remove(chosen, Path(args.reports), is_confirmed=args.yes))
        elif named:
            compare_two(named)
        else:
            list_runs(outputs, args)
    except (Refused, ValueError, argparse.ArgumentTypeError) as error:
        problems = error.problems if isinstance(error, Refused) else [str(error)]
        print(for_terminal("\n".join(problems)), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # at the question: nothing was removed
        sys.exit(130)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.runs", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="two runs to compare, or those to remove"
    )
    parser.add_argument(
        "--filter", action="append", default=[], metavar="KEY=VALUE[,VALUE]",
        help="list (or remove) only runs with one of these values; may be repeated",
    )  # fmt: skip
    parser.add_argument("--sort", metavar="KEY", help="order of the list (default: started)")
    parser.add_argument("--reverse", action="store_true", help="the highest value first")
    parser.add_argument(
        "--remove", action="store_true",
        help="remove the runs: their folders, and their runs, artifacts and models in MLflow; "
        "asks first",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="with --remove: do not ask")
    parser.add_argument(
        "--outputs", type=Path, help=f"folder of the runs (default: {Config.output_dir})"
    )
    parser.add_argument(
        "--reports", default=Config.report_dir,
        help="folder of the sweeps, which know the runs in MLflow (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--watch", nargs="?", const="", metavar="SWEEP",
        help="show a sweep's runs live: its folder or its name (default: the newest one in "
        f"{Config.report_dir}; with --outputs, or without any sweep, all runs in that folder)",
    )  # fmt: skip
    return parser


def refuse_clash(args: argparse.Namespace) -> None:
    """Refuse options that would be left out beside others.

    Raises:
        Refused: there are such.
    """
    listing = {"--filter": args.filter, "--sort": args.sort, "--reverse": args.reverse}
    used = [name for name, value in listing.items() if value]
    if args.watch is not None and (args.runs or args.remove or used):
        raise Refused(["--watch shows all runs of a sweep; leave out RUN and the other options"])
    if args.runs and used:
        raise Refused([f"{used[0]} is for a list; leave it out, or leave out RUN"])
    if args.yes and not args.remove:
        raise Refused(["--yes is for --remove; leave it out"])


def find_watched(sweep: str, outputs: Path | None) -> FindRuns:
    """Return what finds the runs to watch.

    Raises:
        Refused: there is no such sweep, or no run.
    """
    if sweep or outputs is None:
        folder = find_sweep(sweep, Path(Config.report_dir))
        if folder is not None:
            return runs_of_sweep(folder)
    outputs = outputs or Path(Config.output_dir)
    find = runs_of_folder(outputs, is_run)
    if not find():
        raise Refused([f"no sweep in {Config.report_dir}/, and no runs in {outputs}/, to watch"])
    return find


def require_runs(runs: Sequence[RunFolder]) -> None:
    """Raise Refused where a folder is no run's."""
    missing = [str(run.path) for run in runs if not is_run(run)]
    if missing:
        names = ", ".join(missing)
        raise Refused([f"no run in {names}: config.yaml is missing; name outputs/RUN, or its id"])


def compare_two(runs: Sequence[RunFolder]) -> None:
    """Print the comparison of two runs; exit code 1 where damage leaves nothing to compare.

    Raises:
        Refused: these are not two runs.
    """
    if len(runs) != 2:
        raise Refused(["name two runs to compare, or none to list all"])
    require_runs(runs)
    print_damage(runs)
    differing, table = render_settings(*runs), render_pair(*runs)
    if differing.row_count:
        print_table(differing)
        print()
    else:
        print("the runs have equal settings, versions and machines")
    if not table.row_count and any(find_damage(run) for run in runs):
        print("nothing can be compared: the damaged files are left out", file=sys.stderr)
        sys.exit(1)
    if table.row_count:
        print_table(table)
    else:
        print("no task has scored both runs")


def choose_runs(outputs: Path, args: argparse.Namespace) -> list[RunFolder]:
    """Return the runs of a folder that meet the conditions."""
    return [one.run for one in choose(read_runs(outputs), args.filter)]


def read_runs(outputs: Path) -> list[ListedRun]:
    """Read all runs of a folder, and print what is damaged.

    Raises:
        Refused: there is none.
    """
    places = [RunFolder(path) for path in sorted(outputs.glob("*-????????????"))]
    print_damage([run for run in places if run.find_place_problem()])
    found = [run for path in sorted(outputs.glob("*")) if is_run(run := RunFolder(path))]
    if not found:
        raise Refused([f"no runs in {outputs}/; set --outputs FOLDER"])
    print_damage(found)
    return [ListedRun.read(run) for run in found]


def list_runs(outputs: Path, args: argparse.Namespace) -> None:
    """Print the runs of a folder.

    Raises:
        Refused: there is none.
    """
    listed = sort_runs(read_runs(outputs), args.sort, is_reversed=args.reverse)
    chosen = choose(listed, args.filter)
    if chosen:
        print_runs(chosen)
    else:
        print_text(f"none of {len(listed)} runs has {' and '.join(args.filter)}", sys.stderr)
    if any(one.state.state == "lost" for one in chosen):
        print(LOST, file=sys.stderr)


def print_runs(listed: Sequence[ListedRun]) -> None:
    print_table(render_list(listed, output_width()))
    if shared := find_shared(listed):
        settings = " ".join(f"{key}={value}" for key, value in shared.items())
        print_text(f"all with {settings}")


def remove(runs: Sequence[RunFolder], reports: Path, *, is_confirmed: bool) -> int:
    """Remove runs after asking; return the exit code: 1 where MLflow or the disk did not let it.

    Raises:
        Refused: there is none, one is at work, or nobody can be asked.
    """
    if not runs:
        raise Refused(["no run to remove; name runs, or choose them by --filter"])
    require_runs(runs)
    require_answer(is_confirmed=is_confirmed)
    with run_removal.held(runs, reports) as copies:
        print_runs([ListedRun.read(run) for run in runs])
        if unsent := [run.name for run in runs if not copies[run.name] and is_tracked(run)]:
            which = unsent[0] if len(unsent) == 1 else f"{len(unsent)} of them"
            print_text(
                f"no sweep in {reports}/ has sent {which} to MLflow, so nothing is removed there; "
                "--reports names another folder of sweeps"
            )
        size = show_size(sum(folder_size(run.path) for run in runs))
        count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
        sent = sum(any(copy.run_id for copy in found) for found in copies.values())
        those = "" if sent == len(runs) else f"{sent} of them "
        where = f", {those}also in MLflow with artifacts" if sent else ""
        if not confirm(f"remove {count} ({size}){where}", is_confirmed=is_confirmed):
            print("nothing was removed")
            return 0
        code = 0
        for run in runs:
            try:
                notes = run_removal.remove_run(run, copies[run.name])
            except (run_removal.NotRemoved, OSError) as error:
                print(for_terminal(str(error)), file=sys.stderr)
                code = 1
            else:
                print(for_terminal("\n".join([f"removed {run.path}", *notes])))
        return code


def is_tracked(run: RunFolder) -> bool:
    """Return whether the run was made with tracking on, as far as its settings can be read."""
    try:
        return bool((run.read_settings().get("tracking") or {}).get("enabled", True))
    except (Refused, AttributeError):
        return True


def is_run(folder: RunFolder) -> bool:
    """Return whether a folder is a run's, even if one of its files is missing."""
    return any((folder.path / name).exists() for name in ("status.json", "config.yaml"))


def print_damage(runs: Sequence[RunFolder]) -> None:
    for line in (line for run in runs for line in find_damage(run)):
        print(for_terminal(line), file=sys.stderr)


if __name__ == "__main__":
    main()
