"""Every file that a run or a sweep leaves, damaged in every way: named, set aside, no traceback."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from finetune import report, runs
from finetune.config.foreign_runs import find_link_problems
from finetune.config.schema import Config
from finetune.files import ASIDE, Damaged, parse_lines, read_json
from finetune.problems import Refused
from finetune.reporting import reproduction
from finetune.reporting.pages import write_report
from finetune.reporting.results import read_results, write_csv
from finetune.reporting.run_list import ListedRun, render_list
from finetune.reporting.run_pair import render_pair, render_settings
from finetune.tracking import run_files
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.mirror import Mirror
from finetune.tracking.progress import EventTail
from finetune.tracking.run_folder import RunFolder, Status
from finetune.tracking.tracker import MlflowTracker, build_tracker
from tests.test_report import EQUAL, TASK, sweep

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda raw: None,
    "empty": lambda raw: b"",
    "null": lambda raw: b"null",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "lowest bit": lambda raw: flipped(raw, 0x01),
    "top bit": lambda raw: flipped(raw, 0x80),
    "not UTF-8": lambda raw: "ä".encode("latin-1") + raw,
    "list": lambda raw: b"[]",
    "number": lambda raw: b"3\n",
    "text": lambda raw: b'"text"\n',
    "deep": lambda raw: b"[" * 5_000,
}
# The others are a matter of minutes together.
QUICK = [
    how if how in ("missing", "truncated", "top bit", "list")
    else pytest.param(how, marks=pytest.mark.slow)
    for how in DAMAGES
]  # fmt: skip
FILES = (
    "config.yaml", "overrides.yaml", "environment.json", "status.json", "events.jsonl",
    "finetune.log", "data.json", "training.json", "samples.json", "prompt.jinja",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    f"evaluation/{TASK}.json", f"evaluation/{TASK}.items.jsonl", "digests.json",
)  # fmt: skip
UNNOTICED = {  # where what is left is as good as what was there, or no reader goes by it
    ("finetune.log", damage) for damage in DAMAGES
} | {("status.json", "missing"), ("digests.json", "missing"), ("status.json", "lowest bit"),
     ("events.jsonl", "lowest bit")}  # fmt: skip


def flipped(raw: bytes, bit: int) -> bytes:
    """Flip a bit of the byte in the middle."""
    changed = bytearray(raw)
    changed[len(raw) // 2] ^= bit
    return bytes(changed)


def damage(path: Path, how: str) -> None:
    """Damage a file in one of the ways."""
    content = DAMAGES[how](path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def complete(run: RunFolder) -> None:
    """Let a run of a test's report leave the other files too, all recorded."""
    sections = {name: {"key": 1} for name in run_files.SECTIONS}
    run.write_json("config.yaml", sections)
    run.write_text("overrides.yaml", "- lora.r=4\n")
    run.write_text("prompt.jinja", "{{ question }}")
    run.write_json("data.json", {"read": 4, "drawn": 4, "truncated": 0})
    run.write_json("samples.json", [{"prompt": "a", "base": "b", "tuned": "c"}])
    run.write_json("adapter/adapter_config.json", {"r": 4})
    run.log.write_text("a line\n")
    run.write_status(Status("finished", None, 1.0, 2.0))
    events = EventLog(run.events)
    events.tag("train.max_steps", "8")
    events.tag("train.num_tokens", "800")
    events.status("finished")
    events.close()
    import numpy

    save_file({"a": numpy.ones((2, 2), "float32")}, run.path / FILES[11])
    run.record(*FILES[:3], *FILES[6:10], "adapter", "evaluation")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a sweep's folder; its first run, outputs/run-0, has every file."""
    monkeypatch.setattr("finetune.reporting.figures.draw_figures", lambda *_: {})
    made = sweep(tmp_path, ["lora.r"], [["4"], ["8"]])
    complete(RunFolder(tmp_path / "outputs" / "run-0"))
    return made


def read_everything(folder: Path, run: RunFolder) -> str:
    """Read a run as report, list, rerun, live table and mirror do; return what they say of it."""
    results = read_results(folder)
    write_csv(results)
    row = next(row for row in results.rows if row["run"] == run.name)
    score = row.get(f"{TASK}/acc")
    assert score is None or score == sum(EQUAL) / len(EQUAL), "no wrong claim"
    assert row["train/mean_loss"] in (None, 1.25)
    assert row["train/loss"] in (None, 2 - 0.1 * 8)
    render_list([ListedRun.read(run)], 80)
    list(reproduction.find_other_conditions(run, run))
    reproduction.compare_runs(run, run)
    EventTail(run.events).read()
    list(read_events(run.events))
    return "\n".join(results.remarks)


@pytest.mark.parametrize("how", QUICK)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_run_is_named_and_set_aside(
    folder: Path, tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No reader fails or claims what is not there; who holds the run has it made anew."""
    run = RunFolder(tmp_path / "outputs" / "run-0")
    damage(run.path / name, how)
    told = read_everything(folder, run)
    if (name, how) in UNNOTICED:
        return
    assert name in run.find_damage()
    if not name.startswith("adapter"):
        assert f"{name} is damaged" in told
    with caplog.at_level(logging.WARNING, "finetune"):
        run.set_damaged_aside()
    EventLog(run.events).close()
    if how != "missing" and name != "events.jsonl":
        aside = name.partition("/")[0] if name.startswith("adapter") else name
        assert (run.path / f"{aside}{ASIDE}").exists()
        assert name in caplog.text
    retrained = ("training.json", "digests.json")  # without a record nothing proves the weights
    assert run.is_trained == (name not in retrained and not name.startswith("adapter"))
    run.forget_missing()
    assert not set(run.find_damage()) - {"adapter", "events.jsonl"}
    read_everything(folder, run)


@pytest.mark.parametrize("name", FILES)
def test_pages_and_tables_are_made_of_what_is_left(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report names the damaged file; the list and the pair of runs go on without it."""
    run = RunFolder(tmp_path / "outputs" / "run-0")
    damage(run.path / name, "top bit")
    write_report(folder)
    is_told = name != "finetune.log" and not name.startswith("adapter")
    assert (f"{name} is damaged" in (folder / "report.md").read_text()) == is_told
    render_pair(run, run)
    render_settings(run, run)
    runs.print_damage([run])
    assert (f"{name} is damaged" in capsys.readouterr().err) == is_told


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_settings_are_refused_in_a_line(folder: Path, tmp_path: Path, how: str) -> None:
    """None are taken for the defaults, as an empty file would be."""
    run = RunFolder(tmp_path / "outputs" / "run-0")
    damage(run.path / "config.yaml", how)
    with pytest.raises(Refused, match=r"config\.yaml is (damaged|missing)"):
        run.read_config()


@pytest.mark.parametrize("how", QUICK)
def test_a_damaged_file_without_a_record_is_known_by_its_shape(
    folder: Path, tmp_path: Path, how: str
) -> None:
    """A run of an older release has no digests.json; its readers fail on nothing either."""
    run = RunFolder(tmp_path / "outputs" / "run-0")
    (run.path / "digests.json").unlink()
    assert run.find_damage() == {}
    assert run.is_trained
    known = UNNOTICED | {(name, how) for name in ("events.jsonl", "samples.json")} | {
        ("overrides.yaml", "list"), ("overrides.yaml", "truncated"),
        ("adapter/adapter_model.safetensors", "top bit"),
    }  # fmt: skip
    for name in FILES[:-1]:
        content = (run.path / name).read_bytes()
        damage(run.path / name, how)
        if how not in ("missing", "lowest bit") and name not in ("prompt.jinja", "finetune.log"):
            assert name in run.find_damage() or (name, how) in known
        list(reproduction.find_other_conditions(run, run))
        render_list([ListedRun.read(run)], 80)
        (run.path / name).write_bytes(content)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_record_of_a_sweep_is_named(folder: Path, how: str) -> None:
    """The report of it is refused in a line that says what makes it anew."""
    if how == "lowest bit":
        return  # another name for a run, say, which then has no folder
    damage(folder / "sweep.yaml", how)
    with pytest.raises(ValueError, match=r"sweep\.yaml") as refused:
        read_results(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_record_of_what_is_tracked_is_begun_anew(
    folder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither sweep nor report fails by it."""
    monkeypatch.setattr(MlflowTracker, "_keep_sending", lambda self: None)  # to no store
    path = folder / "mlflow.json"
    mirror = Mirror("sqlite:///nowhere.db", "e", "a-sweep", ["lora.r"], "1", "2")
    mirror.add(RunFolder(folder / "run-1"), path)
    damage(path, how)
    read_results(folder)
    if how in ("missing", "lowest bit"):
        return
    with pytest.raises(Damaged):
        Mirror.load(path)
    tracking = Config().tracking
    tracking.uri = f"sqlite:///{folder / 'no' / 'mlflow.db'}"
    tracker = build_tracker(tracking, folder, sweep_name="a-sweep", swept=["lora.r"])
    tracker.follow(RunFolder(folder / "run-1"))
    assert Mirror.load(path).names() == ["run-1"]
    assert path.with_name(path.name + ASIDE).exists()


@pytest.mark.parametrize("kind", [dict, list])
@pytest.mark.parametrize("how", DAMAGES)
def test_the_reader_of_json_returns_its_kind_or_says_why_not(
    tmp_path: Path, how: str, kind: type
) -> None:
    """Nothing else comes out of it."""
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"a": 1}))
    damage(path, how)
    try:
        value: object = read_json(path, kind)
    except Damaged:
        return
    assert value is None or type(value) is kind


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    """The bytes of the log stay where MLflow's mirror counts them; a lost step is told again."""
    run = RunFolder(tmp_path)
    events = EventLog(run.events)
    for step in range(1, 5):
        events.metrics({"train/loss": 1 / step}, step)
    events.close()
    raw = run.events.read_bytes()
    start = raw.index(b"\n") + 5
    run.events.write_bytes(raw[:start] + b"\xff" + raw[start + 1 :])
    assert run.find_damage() == {"events.jsonl": "1 of its lines cannot be read"}
    assert [event["step"] for event in read_events(run.events)] == [1, 3, 4]
    run.set_damaged_aside()
    assert run.find_damage() == {}
    assert len(run.events.read_bytes()) == len(raw)
    assert (tmp_path / f"events.jsonl{ASIDE}").read_bytes().count(b"\xff") == 1
    events = EventLog(run.events)
    for step in range(1, 5):
        events.metrics({"train/loss": 1 / step}, step)
    events.close()
    assert [event["step"] for event in read_events(run.events)] == [1, 3, 4, 2]


def test_a_blank_and_a_torn_line_are_not_damaged() -> None:
    """The first was set aside before, the second is still being written."""
    lines = parse_lines(b'{"a": 1}\n   \n{"a": 2}\n{"a"', lambda line: "a" in line)
    assert [line["a"] for line in lines.values] == [1, 2]
    assert lines.damaged == []


def test_a_large_file_is_taken_by_size_and_time_unless_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan reads no model again; who loads it does."""
    monkeypatch.setattr(run_files, "LARGE_FILE", 10)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 100)
    run_files.record(tmp_path, file.name)
    entry = run_files.read_entries(tmp_path)[file.name]
    import os

    file.write_bytes(b"y" * 100)
    assert run_files.find_difference(file, entry, thorough=False) is not None
    os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
    assert run_files.find_difference(file, entry, thorough=False) is None
    assert run_files.find_difference(file, entry) == "it was altered since it was written"


@pytest.mark.parametrize(
    "content", ["{}", "null", '{"sha256": 3, "files": {}}', "sealed without weights"]
)
def test_weights_that_no_record_proves_are_not_used(
    folder: Path, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are refused, and trained anew, rather than recorded as they are."""
    run = RunFolder(tmp_path / "outputs" / "run-0")
    (run.path / "digests.json").write_text(content)
    if content.startswith("sealed"):
        run.write_text("overrides.yaml", "- lora.r=4\n")  # over a damaged record
        assert json.loads((run.path / "digests.json").read_text())["files"]
    assert "adapter/adapter_model.safetensors" in run.find_weights_damage(thorough=True)
    assert "adapter/adapter_model.safetensors" in run.find_damage()
    assert not run.is_trained
    with caplog.at_level(logging.WARNING, "finetune"):
        run.set_damaged_aside()
    assert (run.path / "adapter.damaged").is_dir()
    assert "adapter" in caplog.text
    assert not run.is_trained


def test_the_weights_of_an_older_release_come_with_the_first_record(
    folder: Path, tmp_path: Path
) -> None:
    """They had no record; scoring them again does not make them unproven."""
    run = RunFolder(tmp_path / "outputs" / "run-0")
    (run.path / "digests.json").unlink()
    run.write_text("overrides.yaml", "- lora.r=4\n")
    assert run.is_trained
    assert not run.find_weights_damage(thorough=True)


IN_PLACE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_named_and_never_waited_for(
    folder: Path, tmp_path: Path, name: str, what: str, is_recorded: bool
) -> None:
    """A pipe, device, folder or loop of links in a file's place is damaged, and set aside."""
    run = RunFolder(tmp_path / "outputs" / "run-0")
    if not is_recorded:
        (run.path / "digests.json").unlink()
    (run.path / name).unlink(missing_ok=True)
    IN_PLACE[what](run.path / name)
    read_everything(folder, run)
    run.last_lines()
    runs.print_damage([run])
    if is_recorded and name != "finetune.log":
        assert name in run.find_damage()
    run.set_damaged_aside()
    EventLog(run.events).close()
    assert run.events.is_file()


@pytest.mark.parametrize("name", ["adapter", "evaluation", "checkpoints"])
@pytest.mark.parametrize("what", ["pipe", "loop"])
def test_what_is_in_a_folders_place_is_set_aside(
    folder: Path, tmp_path: Path, name: str, what: str
) -> None:
    """A pipe or a loop of links is kept beside, so that the folder can be made anew."""
    run = RunFolder(tmp_path / "outputs" / "run-0")
    shutil.rmtree(run.path / name, ignore_errors=True)
    IN_PLACE[what](run.path / name)
    read_everything(folder, run)
    assert run.find_damage()[name] == "it is not a folder"
    run.set_damaged_aside()
    assert os.path.lexists(run.path / f"{name}.damaged")
    (run.path / name).mkdir()


@pytest.mark.parametrize("what", ["pipe", "loop", "device"])
def test_what_is_in_a_runs_place_is_refused(
    folder: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning, report and list name it in a line; no command ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "outputs" / "run-0")
    shutil.rmtree(run.path)
    IN_PLACE[what](run.path)
    assert run.find_place_problem() == "outputs/run-0 is not a folder; move it away"
    assert "run-0: outputs/run-0 is not a folder; move it away" in read_results(folder).remarks
    assert list(find_link_problems(run.path)) == []
    with pytest.raises(Refused):
        run.read_config()


def test_the_report_command_names_what_is_damaged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On the terminal too; a folder in a report's place is named itself."""
    damage(tmp_path / "outputs" / "run-0" / f"evaluation/{TASK}.json", "truncated")
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    report.main()
    assert f"evaluation/{TASK}.json is damaged" in capsys.readouterr().err
    assert f"evaluation/{TASK}.json is damaged" in (folder / "results.csv").read_text()
    (folder / "results.csv").unlink()
    (folder / "results.csv").mkdir()
    with pytest.raises(SystemExit, match="2"):
        report.main()
    remedy = "is a folder where the report writes a file; move it away"
    assert f"{folder / 'results.csv'} {remedy}" in capsys.readouterr().err


def test_two_runs_of_which_damage_leaves_nothing_are_not_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is said, with exit code 1, rather than shown as an empty table."""
    run = tmp_path / "outputs" / "run-0"
    damage(run / f"evaluation/{TASK}.json", "truncated")
    monkeypatch.setattr("sys.argv", ["runs", str(run), str(run)])
    with pytest.raises(SystemExit, match="1"):
        runs.main()
    assert "nothing can be compared" in capsys.readouterr().err
