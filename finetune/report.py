"""Rewrite a sweep's report from its runs: `python -m finetune.report FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune.escaping import for_terminal
from finetune.reporting.pages import write_report
from finetune.reporting.results import find_damage
from finetune.reporting.tables import print_text
from finetune.reporting.verdict import verdict
from finetune.streams import keep_streams


def main() -> None:
    """Write the report of the folder given on the command line."""
    keep_streams()
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m finetune.report multirun_reports/SWEEP", file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        results = write_report(Path(sys.argv[1]))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except IsADirectoryError as error:
        name = error.filename2 or error.filename
        print(f"{name} is a folder where the report writes a file; move it away", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        fault = error.strerror or error
        place = sys.argv[1]
        print(f"{place} cannot be written to ({fault}); check its permissions", file=sys.stderr)
        sys.exit(2)
    for line in (line for run in results.runs for line in find_damage(run)):
        print(for_terminal(line), file=sys.stderr)
    print_text(verdict(results))
    print(f"written: {results.folder / 'report.html'}, report.md, results.csv, figures/")


if __name__ == "__main__":
    main()
