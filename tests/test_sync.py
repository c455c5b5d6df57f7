"""Sync sends a recorded sweep only to a server that its user names."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from finetune import sync
from finetune.config.store_address import masked, needs_typing, sync_command
from finetune.tracking.event_sending import send_events
from finetune.tracking.mirror import Mirror

SERVER = "https://mlflow.example.org/team"


@pytest.mark.parametrize(
    "uri",
    [
        SERVER,
        "http://127.0.0.1@evil.example.org:5000",
        "http://localhost.example.org",
        "http://[",
        "HTTP://EVIL.EXAMPLE.ORG",
        "postgresql://127.0.0.1/x",
        "databricks",
        "file:///tmp/x",
        "",
    ],
)
def test_a_recorded_server_is_not_sent_to_by_itself(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with what to type, exit code 2, and nothing is opened."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("finetune.sync.send", None)
    Mirror(uri, "e", "s", []).save(tmp_path / "mlflow.json")
    monkeypatch.setattr("sys.argv", ["finetune.sync", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        sync.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "would send runs and credentials" in line
    assert line.endswith(sync_command(tmp_path, masked(uri)))


def test_what_the_user_names_is_sent_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed, in the environment, a file, or a server of this machine; others are still refused."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@other")
    monkeypatch.setattr("finetune.sync.send", lambda mirror, path: 3)
    for uri, code in (
        (SERVER, 2), ("sqlite:///mlflow.db", 0), ("http://127.0.0.1:5000", 0),
        ("http://***@other", 0),
    ):  # fmt: skip
        Mirror(uri, "e", "s", [], state="finished").save(tmp_path / "mlflow.json")
        monkeypatch.setattr("sys.argv", ["finetune.sync", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            sync.main()
        assert ended.value.code == code, uri
    Mirror(SERVER, "e", "s", [], state="finished").save(tmp_path / "mlflow.json")
    monkeypatch.setattr("sys.argv", ["finetune.sync", "--uri", SERVER, str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        sync.main()
    assert ended.value.code == 0
    assert f"3 events sent to {SERVER}" in capsys.readouterr().out


def test_the_command_names_the_server_where_it_is_needed() -> None:
    """As it is printed after a run that MLflow missed."""
    assert not needs_typing(SERVER, {"MLFLOW_TRACKING_URI": SERVER})
    assert sync_command(Path("a b"), "sqlite:///x.db") == "python -m finetune.sync 'a b'"
    assert sync_command(Path("a"), SERVER) == f"python -m finetune.sync --uri {SERVER} a"


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "adapter/../../x"])
def test_only_a_runs_own_files_are_sent(tmp_path: Path, path: str) -> None:
    """A log of events can name any file."""
    event = {"event": "artifact", "path": path, "folder": "x"}
    with pytest.raises(ValueError, match="outside of the run"):
        send_events(MagicMock(), "id", tmp_path, [event])
