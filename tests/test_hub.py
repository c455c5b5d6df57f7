"""The hub: one that is not reached is asked once, briefly, for model, data set and task data."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import close_session, constants

from finetune.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig, SourceConfig
from finetune.data.sources import find_source
from finetune.evaluation.tasks import load_task
from finetune.models import hub
from finetune.models.base_model import find_model
from finetune.models.compatibility import HTTPError
from finetune.pipeline import preflight

CONFIG = Config(
    model=ModelConfig(path="owner/model"),
    data=DataConfig(path="owner/rows"),
    evaluation=EvaluationConfig(["arc_easy"]),
)


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test ask anew, and leave the libraries as they were."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "FIRST_ANSWER_SECONDS", 0.3)
    hub.is_reached.cache_clear()
    hub._ask_commit.cache_clear()
    close_session()
    yield
    hub.is_reached.cache_clear()
    hub._ask_commit.cache_clear()
    close_session()


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Accept connections and never answer; return them."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    taken.append(listening.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield taken
        listening.shutdown(socket.SHUT_RDWR)
    for connection in taken:
        connection.close()


def test_model_data_and_task_ask_once_for_all_jobs(
    silent_server: list[socket.socket], capfd: pytest.CaptureFixture[str]
) -> None:
    """Three lines, each with its key, no retry printed, one connection for two jobs."""
    started = time.monotonic()
    for _ in range(2):
        problems = preflight.prepare(CONFIG).problems
        assert [problem.partition("=")[0] for problem in problems] == [
            "model.path", "data.path", "evaluation.tasks",
        ]  # fmt: skip
        assert not any("\n" in problem for problem in problems)
    assert time.monotonic() - started < 5
    assert len(silent_server) == 1
    assert "etry" not in capfd.readouterr().err


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://no.such.host.invalid", "huh"])
def test_a_hub_that_is_not_there_is_no_retry(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A refused connection, an unknown name and a wrong address end alike."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises((OSError, ValueError)):
        load_task("arc_easy", EvaluationConfig(["arc_easy"]))
    assert constants.is_offline_mode()
    assert "etry" not in capfd.readouterr().err


@pytest.mark.parametrize(("status", "is_reached"), [(200, True), (404, True), (503, False)])
def test_any_answer_of_its_own_counts(
    status: int, is_reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that cannot reach the hub answers in its place."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.is_reached() is is_reached
    assert constants.is_offline_mode() is not is_reached


def test_whoever_is_offline_by_choice_asks_nothing(
    silent_server: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE=1 costs no second."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.is_reached()
    assert silent_server == []


def test_each_repository_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever key names it, for all jobs; a branch that moves meanwhile stays as planned."""
    asked: list[tuple[str, str | None, str]] = []

    class Hub:
        def repo_info(self, path: str, *, revision: str | None, repo_type: str, **_: object) -> Any:
            asked.append((path, revision, repo_type))
            if path == "owner/gone":
                raise HTTPError("no answer")
            return SimpleNamespace(sha=f"commit-{len(asked)}")

    rows, mix = SourceConfig("owner/rows"), SourceConfig("owner/rows")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "HfApi", Hub)
        patch.setattr(hub, "is_reached", lambda: True)
        for _ in range(3):
            assert find_model(CONFIG.model).revision == "commit-1"
            assert find_source("data.path", rows).revision == "commit-2"
            assert find_source("data.mix.0.path", mix).revision == "commit-2"
        branch = ModelConfig(path="owner/model", revision="other")
        assert find_model(branch).revision == "commit-3"
        assert len(asked) == 3
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="cannot be reached"):
                find_model(ModelConfig(path="owner/gone"))
