"""Send events that MLflow missed while it was down: `python -m finetune.sync`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from filelock import Timeout

from finetune.config.schema import Config
from finetune.config.store_address import URI_VARIABLE, needs_typing, sync_command, without_secrets
from finetune.files import Damaged
from finetune.problems import first_line
from finetune.reporting.results import read_results
from finetune.reporting.sweep_summaries import summarise
from finetune.streams import keep_streams
from finetune.tracking.claims import CLAIM_FILE, claimed
from finetune.tracking.mirror import Mirror
from finetune.tracking.tracker import send


def main() -> None:
    """Send missing events of some sweeps, or of all; exit code 0, 1 (failed) or 2 (refused)."""
    keep_streams()
    parser = argparse.ArgumentParser(prog="python -m finetune.sync", description=__doc__)
    parser.add_argument(
        "sweeps", nargs="*", type=Path, help=f"folders of sweeps (default: {Config.report_dir}/*)"
    )
    parser.add_argument(
        "--uri",
        help=f"MLflow server of the sweeps, unless it is local, a SQLite file or set by "
        f"{URI_VARIABLE}",
    )
    args = parser.parse_args()
    if args.uri:
        os.environ[URI_VARIABLE] = args.uri
    folders = args.sweeps or sorted(Path(Config.report_dir).glob("*"))
    tracked = [folder for folder in folders if (folder / "mlflow.json").is_file()]
    untracked = [folder for folder in folders if folder not in tracked and folder.is_dir()]
    missing = [folder for folder in folders if not folder.is_dir()]
    for folder in untracked:
        print(
            f"{folder}: has no mlflow.json: not tracked, or the file was deleted; "
            "the sweep's command sends its runs again"
        )
    for folder in missing:
        print(f"{folder}: there is no such sweep", file=sys.stderr)
    refused = [folder for folder in tracked if _is_refused(folder)]
    failed = [folder for folder in tracked if folder not in refused and not _sync(folder)]
    sys.exit(2 if refused else 1 if failed or missing else 0)


def _is_refused(folder: Path) -> bool:
    """Refuse to send to a server that a sweep's file names and the user did not."""
    try:
        uri = Mirror.load(folder / "mlflow.json").uri
    except (Damaged, FileNotFoundError):
        return False  # reported where it is sent
    if not needs_typing(uri):
        return False
    print(
        f"{folder}: its mlflow.json would send runs and credentials to {without_secrets(uri)}; "
        f"if you trust it: {sync_command(folder, uri)}",
        file=sys.stderr,
    )
    return True


def _sync(folder: Path) -> bool:
    path = folder / "mlflow.json"
    try:
        with claimed(folder / CLAIM_FILE, wait=False):
            return _send_rest(folder, Mirror.load(path), path)
    except Damaged as damage:
        print(
            f"{path} is damaged: {damage}; the sweep's command recreates it and sends all events",
            file=sys.stderr,
        )
        return False
    except Timeout:
        print(f"{folder}: the sweep is running, and sends its events itself", file=sys.stderr)
        return False
    except OSError as error:
        fault = f"cannot be written to ({error.strerror}); check its permissions"
        print(f"{folder} {fault}", file=sys.stderr)
        return False


def _send_rest(folder: Path, mirror: Mirror, path: Path) -> bool:
    try:
        if mirror.state == "running":
            _conclude(mirror, folder)
        num_events = send(mirror, path)
    except Exception as error:  # whatever the store raises
        print(f"{folder}: {mirror.uri}: {without_secrets(first_line(error))}", file=sys.stderr)
        return False
    print(f"{folder}: {num_events} events sent to {mirror.uri}")
    return True


def _conclude(mirror: Mirror, folder: Path) -> None:
    """End a sweep whose process was killed before it could say how it ended."""
    results = read_results(folder)
    states = {row["status"] for row in results.rows}
    if states <= {"finished", "failed", "diverged"}:
        mirror.state = "finished" if states == {"finished"} else "failed"
    else:
        mirror.state = "interrupted"
    mirror.summary = summarise(results)


if __name__ == "__main__":
    main()
