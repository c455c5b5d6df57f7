"""What is exported says what was trained, wherever it is loaded, or it is not exported."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import finetune
from finetune import export, logs
from finetune.config.inputs import Source
from finetune.config.schema import LoraConfig, ModelConfig, PeftConfig
from finetune.inference.merging import find_prompts, log_likelihoods
from finetune.inference.trained import find_trained, load_as_published
from finetune.models import adapters, base_model
from tests.conftest import train_tiny
from tests.test_chat import change, full_copy
from tests.test_quantization import write_checkpoint

TINY = ModelConfig(path="random://tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> Path:
    """Return a run with scores that are written down."""
    path = train_tiny(tmp_path_factory.mktemp("run"), lora=LoraConfig(r=2))
    (path / "evaluation").mkdir()
    sides = {"base": 0.25, "tuned": 0.75}
    score = {
        side: {"metrics": {"acc": acc, "acc_stderr": 0.125}, "num_questions": 4}
        for side, acc in sides.items()
    }
    (path / "evaluation" / "science.json").write_text(json.dumps(score))
    right = {"base": (1, 0, 0, 0), "tuned": (1, 1, 1, 0)}
    items = [
        {"hash": str(n), "prompt": "p", **{side: {"acc": right[side][n]} for side in sides}}
        for n in range(4)
    ]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (path / "evaluation" / "science.items.jsonl").write_text(lines)
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    monkeypatch.setattr(logs, "quieten_libraries", disable_progress_bar)
    try:
        export.main()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def trained_log_likelihoods(path: Path) -> torch.Tensor:
    """Return what the run's own model makes of its prompts, loaded as it was scored."""
    run = find_trained(path)
    adapted = adapters.load(run.load_base(), run.folder.adapter)
    return log_likelihoods(adapted, find_prompts(run, run.load_tokenizer()))


def code_of(card: str) -> str:
    """Return the code that a card says to load its model by."""
    return card.split("```python\n")[1].split("```")[0]


def test_an_adapter_is_exported_with_all_it_takes_to_load_it(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's own code loads the model that was trained; the card says what it is."""
    run = shutil.copytree(run, tmp_path / run.name)
    change(run, "optimizer.scheduler", "${oc.env:FINETUNE_TEST_SECRET}")
    monkeypatch.setenv("FINETUNE_TEST_SECRET", "linear")
    into = tmp_path / "deep" / "export"
    into.mkdir(parents=True)  # an empty folder is as good as none
    assert call(monkeypatch, run, "--into", into) == 0
    assert {file.name for file in into.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md",
    }  # fmt: skip
    settings = json.loads((into / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base_model.find_model(TINY).location

    card = (into / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "peft"
    assert front["tags"] == ["finetune", "lora"]
    assert "base_model" not in front  # the hub takes none but its own ids
    assert "| science | acc | higher | 0.2500 ± 0.1250 | 0.7500 ± 0.1250 | +50.0 points (" in card
    assert "8 of 589 rows used" in card
    assert "- peft 0." in card
    assert "scheduler: ${oc.env:FINETUNE_TEST_SECRET}" in card
    assert "linear\n" not in card

    loaded: dict[str, Any] = {}
    exec(code_of(card), loaded)  # noqa: S102  # what a reader would do
    trained = find_trained(run)
    prompts = find_prompts(trained, loaded["tokenizer"])
    found = log_likelihoods(loaded["model"], prompts)
    assert torch.equal(found, trained_log_likelihoods(run))
    assert "finetune.base_path('random://tiny')" in code_of(card)
    asking = card.split("```python\n")[2].split("```")[0]
    assert "### Instruction:\\nWhy is the sky blue?" in asking
    exec(asking.replace("max_new_tokens=100", "max_new_tokens=1"), loaded)  # noqa: S102
    assert loaded["prompt"] == finetune.prompt(run, "Why is the sky blue?")
    for folder in (into, run / "adapter"):
        assert (folder / "tokenizer.json").is_file()
        assert "{{ instruction }}" in (folder / "prompt.jinja").read_text(encoding="utf-8")


def test_older_cards_load_their_base() -> None:
    """They name it by what was no public name then."""
    from finetune.models import ModelConfig, find_model

    assert find_model(ModelConfig("random://tiny")).location == finetune.base_path("random://tiny")


def test_a_hub_base_is_named_by_id_and_commit(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Card and adapter say which base, and at which commit."""
    local = base_model.find_model(TINY)
    hub = Source("owner/base", "hub:owner/base@abc", "abc")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    change(copy, "model.path", "owner/base")
    monkeypatch.setattr(base_model, "find_model", lambda _model: hub)
    # Only the config and the tokenizer are loaded; the hub is not asked.
    for name in ("load_config", "load_tokenizer"):
        load = getattr(base_model, name)
        monkeypatch.setattr(base_model, name, lambda model, _, load=load: load(model, local))
    assert call(monkeypatch, copy, "--into", tmp_path / "export") == 0
    settings = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/base"
    assert settings["revision"] == "abc"
    card = (tmp_path / "export" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "owner/base"
    assert "from_pretrained('owner/base', revision='abc')" in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "lora"),
    [
        (TINY, LoraConfig(r=2, use_rslora=True)),
        (TINY, LoraConfig(r=2, init="pissa", use_dora=True)),
        (replace(TINY, dtype="bf16"), LoraConfig(r=2)),
        (replace(TINY, quantization="nf4"), LoraConfig(r=2, init="olora")),
        (replace(TINY, quantization="int8"), LoraConfig(r=2)),
    ],
)
def test_a_merged_model_says_what_the_run_says(
    tmp_path: Path, model: ModelConfig, lora: LoraConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Loaded by plain transformers, it is the run's model; how near is printed and in the card."""
    run = train_tiny(tmp_path / "outputs", model=model, lora=lora)
    into = tmp_path / "merged"
    assert call(monkeypatch, run, "--merge", "--into", into) == 0
    said = capsys.readouterr().out
    assert "of the run's prompts" in said
    assert ("quantised" in said) == (model.quantization != "none")
    card = (into / "README.md").read_text()
    assert ("was quantised" in card) == (model.quantization != "none")
    assert "Merged and unmerged model were compared: log-likelihoods of 8" in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"

    plain = replace(model, path=str(into), quantization="none")
    merged = base_model.load_base(plain, base_model.find_model(plain), torch.device("cpu"))
    trained = find_trained(run)
    prompts = find_prompts(trained, trained.load_tokenizer())
    found, unmerged = log_likelihoods(merged, prompts), trained_log_likelihoods(run)
    exact = model.dtype == "auto" and model.quantization != "int8"
    assert torch.allclose(found, unmerged, rtol=0, atol=1e-6 if exact else 2e-3)
    tuned = (log_likelihoods(trained.load_base(), prompts) - unmerged).abs().max()
    assert tuned > 0.02  # the base itself would not pass


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantised_already_is_merged(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dequantised in the run's dtype, and saved without its quantisation."""
    model = write_checkpoint(tmp_path / "model", kind)
    run = train_tiny(tmp_path / "outputs", model=model, lora=LoraConfig(r=2))
    into = tmp_path / "merged"
    assert call(monkeypatch, run, "--merge", "--into", into) == 0
    assert "quantization_config" not in json.loads((into / "config.json").read_text())
    plain = ModelConfig(path=str(into))
    merged = base_model.load_base(plain, base_model.find_model(plain), torch.device("cpu"))
    prompts = find_prompts(find_trained(run), find_trained(run).load_tokenizer())
    found, trained = log_likelihoods(merged, prompts), trained_log_likelihoods(run)
    assert torch.allclose(found, trained, rtol=0, atol=1e-5 if kind == "nf4" else 2e-2)


def test_ia3_on_a_quantised_base_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT refuses to take it off a 4-bit base; the check afterwards passes."""
    model = replace(TINY, quantization="nf4")
    run = train_tiny(tmp_path / "outputs", model=model, peft=PeftConfig("ia3"))
    assert call(monkeypatch, run, "--merge", "--into", tmp_path / "merged") == 0
    assert "was quantised" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=2, init="olora", use_rslora=True),
        LoraConfig(r=2, init="pissa", use_dora=True),
    ],
)
def test_an_adapter_that_changed_its_base_is_made_to_fit_the_published_one(
    tmp_path: Path, lora: LoraConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nothing is taken out of the base that it is loaded onto, and it says the same."""
    run = train_tiny(tmp_path / "outputs", lora=lora)
    into = tmp_path / "export"
    assert call(monkeypatch, run, "--into", into) == 0
    assert "converted to an adapter for the published base model" in capsys.readouterr().out
    trained = find_trained(run)
    prompts, wanted = find_prompts(trained, trained.load_tokenizer()), trained_log_likelihoods(run)
    base = AutoModelForCausalLM.from_pretrained(trained.source.location)
    weights = {name: p.clone() for name, p in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, str(into))
    assert torch.allclose(log_likelihoods(adapted, prompts), wanted, rtol=0, atol=1e-6)
    assert all(torch.equal(p, weights[name]) for name, p in adapted.unload().named_parameters())
    as_saved = load_as_published(trained.load_base(), trained.folder.adapter)
    assert (log_likelihoods(as_saved, prompts) - wanted).abs().max() > 1e-3


@pytest.mark.slow
def test_no_adapter_is_made_for_a_base_that_was_quantised_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """OLoRA on a quantised base leaves another base; that can only be merged."""
    quantised = replace(TINY, quantization="nf4")
    run = train_tiny(tmp_path / "outputs", model=quantised, lora=LoraConfig(r=2, init="olora"))
    assert call(monkeypatch, run, "--into", tmp_path / "export") == 2
    said = (
        "expressed as an adapter for the original base; export a merged model: python -m finetune."
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_what_does_not_pass_its_check_is_not_exported(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 1, and nothing is left."""

    def halved(*given: Any) -> PeftModel:
        adapted = load_as_published(*given)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data /= 2
        return adapted

    monkeypatch.setattr("finetune.inference.merging.load_as_published", halved)
    assert call(monkeypatch, run, "--merge", "--into", tmp_path / "merged") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export aborted: the exported model's log-likelihoods differ from the")
    assert "trained model's: log-likelihoods of 8" in line
    assert list(tmp_path.iterdir()) == []  # of the temporary folder neither


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("prompt_tuning", "changes no weights of the base model"),
        ("full", "has no adapter to merge"),
    ],
)
def test_a_method_that_cannot_be_merged_is_told(
    tmp_path: Path, run: Path, method: str, told: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line and exit code 2."""
    copy = tmp_path / "copy"
    if method == "full":
        full_copy(run, copy)
    else:
        shutil.copytree(run, copy)
        change(copy, "peft.method", method)
    assert call(monkeypatch, copy, "--merge", "--into", tmp_path / "into") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert told in line


def test_a_full_run_is_exported_as_the_model_that_it_is(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, tokenizer and card, loaded by the card's code."""
    full, into = full_copy(run, tmp_path / "full"), tmp_path / "into"
    assert call(monkeypatch, full, "--into", into) == 0
    loaded: dict[str, Any] = {}
    exec(code_of((into / "README.md").read_text()), loaded)  # noqa: S102
    prompts = find_prompts(find_trained(full), loaded["tokenizer"])
    found = log_likelihoods(loaded["model"], prompts)
    assert torch.allclose(found, trained_log_likelihoods(run), rtol=0, atol=1e-6)


def test_a_folder_that_holds_something_is_refused(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is overwritten."""
    (tmp_path / "mine.txt").write_text("mine")
    assert call(monkeypatch, run, "--into", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "exists already; set another folder with --into" in line
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


class Hub(ThreadingHTTPServer):
    """The few endpoints of the hub that an upload asks, on loopback."""

    def __init__(self, refuses: int | None, is_private: bool) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.refuses = refuses
        self.is_private = is_private
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.cards: list[str] = []  # whose front matter was checked
        self.tokens: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Requests(BaseHTTPRequestHandler):
    """Answer as the hub does: create a repository, say how each file goes up, take the commit."""

    server: Hub

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/mine", "private": self.server.is_private})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses is not None:
            self._answer(self.server.refuses, {"error": "no"})
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer(200, {"url": f"{self.server.url}/me/mine"})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/me/mine/preupload/main":
            asked = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in asked
            ]
            self._answer(200, {"files": modes})
        elif self.path.startswith("/api/models/me/mine/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            url = f"{self.server.url}/me/mine/commit/{'0' * 40}"
            self._answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        else:
            self._answer(404, {"error": self.path})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub in this process, where the client looks for the real one."""
    with Hub(*getattr(request, "param", (None, True))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()
        thread.join()


def test_an_export_is_pushed(
    tmp_path: Path, run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every file arrives as it lies in the folder, in a private repository; the URL is printed."""
    into = tmp_path / "export"
    assert call(monkeypatch, run, "--into", into, "--push", "me/mine", "--private") == 0
    said = capsys.readouterr()
    assert f"pushed: {hub.url}/me/mine\n" in said.out
    assert "hf_secret" not in said.out + said.err
    assert hub.created == {"name": "mine", "organization": "me", "visibility": "private"}
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.files == {file.name: file.read_bytes() for file in into.iterdir()}
    assert hub.cards == [hub.files["README.md"].decode()]
    assert "PeftModel.from_pretrained(base, 'me/mine')" in hub.cards[0]


@pytest.mark.parametrize(
    ("hub", "told"),
    [
        ((401, True), "the hub rejects the token (401); set HF_TOKEN"),
        ((403, True), "the token has no write access (403); use one that has"),
        ((None, False), "exists already and is public"),
    ],
    indirect=["hub"],
)
def test_a_failed_upload_says_what_to_do(
    tmp_path: Path, hub: Hub, told: str, monkeypatch: pytest.MonkeyPatch, run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line with a remedy, exit code 1; the folder stays, nothing was uploaded."""
    into = tmp_path / "export"
    assert call(monkeypatch, run, "--into", into, "--push", "me/mine", "--private") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("not pushed: ")
    assert told in line
    assert line.endswith(f"upload it with: hf upload me/mine {into}")
    assert (into / "README.md").is_file()
    assert hub.files == {}


def test_a_hub_that_cannot_be_reached_is_told(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address stands in the one line."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(export.NotExported, match=f"not pushed: {address} cannot be reached"):
        export.push(tmp_path, "me/mine", is_private=False)


@pytest.mark.parametrize(
    ("repo", "offline", "token", "told"),
    [
        ("mine", False, "t", "has no owner; write OWNER/NAME"),
        ("a/b/c", False, "t", "Repo id must be"),
        ("me/mine", True, "t", "HF_HUB_OFFLINE"),
        ("me/mine", False, None, "set HF_TOKEN"),
    ],
)
def test_an_upload_that_could_not_begin_is_refused_first(
    tmp_path: Path, repo: str, offline: bool, token: str | None, told: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Before anything is loaded or written."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert call(monkeypatch, tmp_path, "--into", tmp_path / "into", "--push", repo) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--push {repo}: ")
    assert told in line


def test_private_without_push_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that would do nothing is a mistake."""
    assert call(monkeypatch, "outputs/run", "--private") == 2
    assert "--private needs --push" in capsys.readouterr().err
