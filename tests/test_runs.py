"""`finetune.runs`: the list of runs, filtered and sorted, two runs side by side, and removal."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune import runs
from finetune.config.schema import Config
from finetune.problems import Refused
from finetune.reporting.run_list import ListedRun, choose, render_list, sort_runs
from finetune.reporting.tables import print_table, show_size
from finetune.tracking import progress
from finetune.tracking.claims import claimed
from finetune.tracking.events import EventLog
from finetune.tracking.run_folder import RunFolder, Status
from finetune.tracking.run_names import find_run, shorten_names
from tests.test_progress import write_losses, write_size

STATES = {"2": "finished", "4": "failed", "16": "finished"}


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs, ranks 2, 4 and 16, in the current folder's outputs."""
    for number, (rank, state) in enumerate(STATES.items()):
        name = f"tiny-lora-r{rank}-{number}{'abcdef01234'}"
        write_run(tmp_path / "outputs" / name, rank, state, started=100.0 - number)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def write_run(folder: Path, rank: str, state: Any, started: float) -> RunFolder:
    run = RunFolder(folder)
    config = OmegaConf.structured(Config)
    config.lora.r = int(rank)
    run.write_text("config.yaml", OmegaConf.to_yaml(config))
    typed = ["model=tiny", f"lora.r={rank}", "optimizer.lr=1e-3", "tracking=none"]
    run.write_text("overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(typed)))
    run.write_json("environment.json", {"versions": {"torch": rank}, "worker": f"w{rank}"})
    score = {"metrics": {"acc": 1 / int(rank), "acc_norm": 0.5}, "seconds": 1.0}
    run.write_json("evaluation/task.json", {"tuned": score})
    write_size(run.events, 100)
    write_losses(run.events, range(1, 10 * int(rank)))
    events = EventLog(run.events)
    events.status(state)
    events.close()
    run.write_status(Status(state, started=started, ended=200.0))
    return run


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call the command; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["runs", *arguments])
    try:
        runs.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def read(outputs: Path) -> list[ListedRun]:
    paths = sorted(outputs.iterdir(), key=lambda path: path.name.rpartition("-")[2])
    return [ListedRun.read(RunFolder(path)) for path in paths]


def ranks(listed: list[ListedRun]) -> list[str]:
    return [one.typed["lora.r"] for one in listed]


def test_the_list_fits_80_columns(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """State, step, loss, worker and what differs stay, under short ids; metrics give way."""
    print_table(render_list(read(outputs), 80))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert lines[0].split() == ["task"]
    heading = ["run", "state", "step", "loss", "worker", "ended", "settings", "acc"]
    assert lines[1].split() == heading
    row = lines[2].split()
    assert row[:5] == ["0abcde", "finished", "19/100", "1.000", "w2"]
    assert row[-2:] == ["lora.r=2", "0.5000"]
    assert len(lines) == 5


def test_what_all_runs_share_is_printed_once(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below the list; the sweep's own settings are left out."""
    assert call(monkeypatch) == 0
    out = capsys.readouterr().out
    assert "all with model=tiny optimizer.lr=1e-3\n" in out
    assert "tracking" not in out


def test_each_run_is_looked_at_once(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of runs on a slow disk asks each for its state only once."""
    looked: list[Path] = []
    look = progress.FollowedRun.look

    def counted(self: progress.FollowedRun) -> progress.RunState:
        looked.append(self._run.path)
        return look(self)

    monkeypatch.setattr(progress.FollowedRun, "look", counted)
    assert call(monkeypatch) == 0
    assert len(looked) == len(set(looked)) == 3


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["state=failed"], ["4"]),
        (["state=failed,finished", "lora.r=2"], ["2"]),
        (["r=16"], ["16"]),
        (["lr=0.001"], ["2", "4", "16"]),
        (["optimizer.weight_decay=0"], ["2", "4", "16"]),
        (["run=*r1*"], ["16"]),
        (["acc=0.25"], ["4"]),
        (["host="], ["2", "4", "16"]),
        (["worker=other"], []),
    ],
)
def test_runs_are_filtered(outputs: Path, conditions: list[str], expected: list[str]) -> None:
    """By columns, metrics and settings, typed or not; numbers by their value; all must hold."""
    assert ranks(choose(read(outputs), conditions)) == expected


@pytest.mark.parametrize(
    ("key", "is_reversed", "expected"),
    [
        (None, False, ["16", "4", "2"]),
        ("lora.r", False, ["2", "4", "16"]),
        ("r", True, ["16", "4", "2"]),
        ("acc", False, ["16", "4", "2"]),
        ("state", False, ["4", "16", "2"]),
        ("loss", True, ["16", "2", "4"]),
    ],
)
def test_runs_are_sorted(
    outputs: Path, key: str | None, is_reversed: bool, expected: list[str]
) -> None:
    """Numbers by size, equal ones by name; without a key in the order of their starts."""
    assert ranks(sort_runs(read(outputs), key, is_reversed=is_reversed)) == expected


def test_a_filter_may_leave_nothing(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says so; the key of the order is one of any run."""
    assert call(monkeypatch, "--filter", "state=lost", "--filter", "r=2", "--sort", "acc") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "none of 3 runs has state=lost and r=2\n")


def test_runs_without_a_value_come_last(outputs: Path) -> None:
    """In both directions."""
    write_run(outputs / "new", "8", "running", started=1.0)
    (outputs / "new" / "evaluation" / "task.json").unlink()
    for is_reversed in (False, True):
        assert ranks(sort_runs(read(outputs), "acc", is_reversed=is_reversed))[-1] == "8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "failed"], "write KEY=VALUE"),
        (["--filter", "stat=failed"], "did you mean 'state'?"),
        (["--sort", "acccc"], "no run has acccc"),
        (["--sort", "path"], "data.path"),
        (["--remove"], "no run to remove"),
        (["--remove", "nothing"], "no run in nothing"),
        (["0abc"], "name two runs"),
        (["0abc", "1abc", "--sort", "acc"], "--sort is for a list"),
        (["0abc", "--remove", "--yes", "--filter", "r=4"], "--filter is for a list"),
        (["--watch", "--remove", "--yes"], "--watch shows all runs"),
        (["--yes"], "--yes is for --remove"),
        (["0abc", "zz"], "no run in zz"),
    ],
)
def test_what_makes_no_sense_is_refused(
    outputs: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line with the remedy, exit code 2, and nothing is removed."""
    assert call(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
    assert len(list(outputs.iterdir())) == 3


def test_two_runs_are_compared_in_what_differs(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings, versions and workers, without those that are equal; named by their ids."""
    assert call(monkeypatch, "0abc", "1abc") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [["setting", "0abcde", "1abcde"], ["lora.r", "2", "4"], ["torch", "2", "4"]]
    assert ["no", "task", "has", "scored", "both", "runs"] in lines


def test_an_id_names_a_run(tmp_path: Path) -> None:
    """A path and a name do, too; one that several begin with is refused with their names."""
    for name in ("a-0123456789ab", "b-0123ffffffff", "plain"):
        (tmp_path / name).mkdir()
    assert find_run("01234", tmp_path) == tmp_path / "a-0123456789ab"
    assert find_run("plain", tmp_path) == tmp_path / "plain"
    assert find_run(str(tmp_path / "plain"), tmp_path) == tmp_path / "plain"
    assert find_run("outputs/none", tmp_path) == Path("outputs/none")
    with pytest.raises(ArgumentTypeError, match="a-0123456789ab, b-0123ffffffff"):
        find_run("0123", tmp_path)
    assert shorten_names(["a-0123456789ab", "b-0123ffffffff", "plain"]) == [
        "012345",
        "0123ff",
        "plain",
    ]
    assert shorten_names(["a-0123456789ab", "b-0123456fffff"]) == ["01234567", "0123456f"]


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB")]
)
def test_a_size_has_a_unit_that_suits_it(size: float, shown: str) -> None:
    """Three digits are enough."""
    assert show_size(size) == shown


def test_a_removal_is_confirmed(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal by an answer, a no being the default; elsewhere by --yes alone."""
    assert call(monkeypatch, "0abc", "--remove") == 2
    assert "add --yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, left in (("", 3), ("n", 3), ("y", 2)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert call(monkeypatch, "0abc", "--remove") == 0
        assert len(list(outputs.iterdir())) == left
    assert "removed outputs/tiny-lora-r2" in capsys.readouterr().out
    assert call(monkeypatch, "--filter", "state=failed,finished", "--remove", "--yes") == 0
    assert list(outputs.iterdir()) == []


def test_a_run_that_no_sweep_here_has_sent_is_said_to_stay_in_mlflow(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sweep's folder may be elsewhere; without tracking there is nothing to say."""
    said = "no sweep in multirun_reports/ has sent tiny-lora-r2-0abcdef01234 to MLflow"
    assert call(monkeypatch, "0abc", "--remove", "--yes") == 0
    assert said in capsys.readouterr().out
    run = RunFolder(next(outputs.glob("*-1abc*")))
    settings = run.read_settings()
    settings["tracking"]["enabled"] = False
    run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings)))
    assert call(monkeypatch, "1abc", "--remove", "--yes") == 0
    assert "has sent" not in capsys.readouterr().out


def test_a_run_at_work_is_not_removed(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is any other that was named with it."""
    (first, *_) = sorted(outputs.iterdir())
    with claimed(RunFolder(first).claim):
        assert call(monkeypatch, "--filter", "r=2,4,16", "--remove", "--yes") == 2
    assert "is running in" in capsys.readouterr().err
    assert len(list(outputs.iterdir())) == 3


def test_a_condition_on_no_runs_is_refused() -> None:
    """There is no column without a run."""
    with pytest.raises(Refused, match="no run has"):
        choose([], ["state=failed"])
