"""A conversation answers as each run's own model does, and is asked as each run was trained."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from finetune import chat, logs
from finetune.config.schema import DataConfig, LoraConfig
from finetune.data.templates import load_template
from finetune.data.turns import Unusable
from finetune.inference import conversation
from finetune.inference.conversation import Conversation, Sampling, find_ends
from finetune.inference.trained import Trained, find_trained
from finetune.models import adapters
from finetune.problems import Refused
from finetune.tracking import run_files
from finetune.tracking.run_folder import RunFolder
from tests.conftest import train_tiny, write_rows

FEW = Sampling(max_new_tokens=12, temperature=0.0)
QUESTION = "Name the sea."


def ignore(_text: str) -> None:
    """Take what a conversation writes as it goes."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> dict[str, Path]:
    """Return runs on one base: instructions, an initialisation that changes the base, chats."""
    folder = tmp_path_factory.mktemp("runs")
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello you"}]
    rows = write_rows(folder / "chat.jsonl", [{"messages": turns}] * 8)
    chats = DataConfig(path=str(rows), prompt_template="chat")
    return {
        "plain": train_tiny(folder / "plain", lora=LoraConfig(r=2)),
        "pissa": train_tiny(folder / "pissa", lora=LoraConfig(r=4, init="pissa")),
        "chat": train_tiny(folder / "chat", lora=LoraConfig(r=2), data=chats),
    }


@pytest.fixture
def loaded(runs: dict[str, Path]) -> Conversation:
    """Return a conversation with all of them."""
    return conversation.load([find_trained(path) for path in runs.values()])


def generated(model: Any, run: Trained, text: str) -> str:
    """Return what transformers' own greedy generation says to a prompt."""
    tokenizer = run.load_tokenizer()
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    said = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
        max_new_tokens=FEW.max_new_tokens,
    )  # fmt: skip
    return str(tokenizer.decode(said[0, tokens.shape[1] :], skip_special_tokens=True))


def prompt_of(template: str) -> str:
    """Return the Alpaca prompt around the question."""
    fields = {"instruction": QUESTION, "input": None, "output": "-"}
    return load_template(template).render(fields)[0].content


def test_each_answer_comes_from_the_adapter_named(
    runs: dict[str, Path], loaded: Conversation
) -> None:
    """Beside others, each run says what it says alone, and the base what the bare base says."""
    text, answers = prompt_of("alpaca"), {}
    for name in ("plain", "pissa"):
        run = find_trained(runs[name])
        loaded.use(run.name)
        alone = adapters.load(run.load_base(), run.folder.adapter)
        answers[name] = loaded.answer(QUESTION, FEW, ignore)
        assert answers[name] == generated(alone, run, text)
    loaded.use("base")
    bare = generated(run.load_base(), run, text)
    assert loaded.answer(QUESTION, FEW, ignore) == bare
    assert len({*answers.values(), bare}) == 3
    loaded.use(find_trained(runs["plain"]).name)
    assert loaded.answer(QUESTION, FEW, ignore) == answers["plain"]


class Asked(Conversation):
    """A conversation that answers by number, and keeps the texts that it would have sent."""

    def __init__(self, like: Conversation) -> None:
        super().__init__(like.model, like.tokenizer, like.voices)
        self.texts: list[str] = []

    def _generate(self, tokens: list[int], sampling: Sampling, spoken: conversation.Spoken) -> None:
        self.texts.append(str(self.tokenizer.decode(tokens)))
        spoken.on_finalized_text(f"answer {len(self.texts)}", stream_end=True)


def test_a_run_is_asked_as_it_was_trained(runs: dict[str, Path], loaded: Conversation) -> None:
    """Instructions stand alone, chats go on until they are reset, whoever spoke in between."""
    talk = Asked(loaded)
    talk.use(runs["chat"].name)
    talk.answer("one", FEW, ignore)
    talk.use(runs["plain"].name)
    talk.answer(QUESTION, FEW, ignore)
    talk.use(runs["chat"].name)
    talk.answer("two", FEW, ignore)
    talk.reset()
    talk.answer("three", FEW, ignore)
    begin = "<s>assistant\n"
    assert talk.texts == [
        f"<s>user\none</s>\n{begin}",
        prompt_of("alpaca"),
        f"<s>user\none</s>\n{begin}answer 1</s>\n<s>user\ntwo</s>\n{begin}",
        f"<s>user\nthree</s>\n{begin}",
    ]


def with_prompt(run: Path, template: str, into: Path) -> Path:
    """Return a copy of a run that was taught by another template."""
    shutil.copytree(run, into)
    name = "text" if template == "text" else "gone.jinja"
    if name != "text":
        (into / "prompt.jinja").write_text(template, encoding="utf-8")
    change(into, "data.prompt_template", name)
    return into


def change(run: Path, key: str, value: str) -> None:
    """Change a setting that a run recorded."""
    settings = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(settings, key, value)
    RunFolder(run).write_text("config.yaml", OmegaConf.to_yaml(settings))


@pytest.mark.parametrize(
    ("template", "lines", "asked"),
    [
        ("text", ["Once upon"], "Once upon"),
        ("Q: {{ question }}\nA:", ["why: so?"], "Q: why: so?\nA:"),
        (
            "{{ question }}{% for c in choices %} ({{ c }}){% endfor %}:",
            ['choices: ["a", "b"]', "question: which?"],
            "which? (a) (b):",
        ),
    ],
)
def test_a_text_is_gone_on_with_and_an_own_template_filled_in(
    tmp_path: Path, runs: dict[str, Path], template: str, lines: Sequence[str], asked: str
) -> None:
    """One field is the line itself; several are given by name, and asked once all are there."""
    run = find_trained(with_prompt(runs["plain"], template, tmp_path / "run"))
    talk = Asked(conversation.load([run]))
    answers = [talk.answer(line, FEW, ignore) for line in lines]
    assert answers == [*[None] * (len(lines) - 1), "answer 1"]
    assert talk.texts == [asked]


def test_a_field_that_is_not_asked_for_is_told(tmp_path: Path, runs: dict[str, Path]) -> None:
    """The fields are named; a template that cannot be filled in says why."""
    run = with_prompt(runs["plain"], "{{ a / b }}:", tmp_path / "run")
    talk = Asked(conversation.load([find_trained(run)]))
    with pytest.raises(Unusable, match="a line for each of a, b"):
        talk.answer("c: 1", FEW, ignore)
    assert talk.answer("a: 1", FEW, ignore) is None
    with pytest.raises(Unusable, match="division by zero"):
        talk.answer("b: 0", FEW, ignore)


def test_a_conversation_that_fills_the_model_is_told(loaded: Conversation) -> None:
    """More tokens than the model was made for are refused, with the way out."""
    with pytest.raises(Unusable, match="1024 tokens; /reset"):
        loaded.answer("a" * 2000, FEW, ignore)


def test_an_answer_ends_where_the_template_ends_a_turn(
    runs: dict[str, Path], loaded: Conversation
) -> None:
    """Also where the model's own end of sequence is another token."""
    loaded.use(runs["chat"].name)
    loaded.tokenizer.eos_token = "<pad>"  # noqa: S105  # a token of text
    assert find_ends(loaded.model, loaded.tokenizer, loaded.voice.template) == [0, 2]


def test_a_stopped_answer_is_remembered_as_far_as_it_went(
    runs: dict[str, Path], loaded: Conversation, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ctrl-C ends the answer, not the program."""

    def stopped(self: Conversation, _: object, __: object, spoken: conversation.Spoken) -> None:
        spoken.on_finalized_text("as far as ")
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "_generate", stopped)
    loaded.use(runs["chat"].name)
    chat.talk(loaded, FEW, ["go on", "/list"])
    said = capsys.readouterr()
    assert said.out == "as far as \n"
    assert "(stopped)" in said.err
    assert [turn.content for turn in loaded.turns] == ["go on", "as far as "]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, lines: str = "") -> int:
    """Run the command in this process, lines coming through a pipe; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["chat", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(logs, "quieten_libraries", lambda: None)
    try:
        chat.main()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_a_pipe_of_lines_comes_out_as_answers(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers alone are printed; commands, mistakes among them, are answered beside; /quit ends."""
    lines = f"{QUESTION}\n\n/use base\n{QUESTION}\n/use nobody\n/what\n/list\n/quit\n{QUESTION}\n"
    arguments = (runs["plain"], "--max-new-tokens", "12")
    assert call(monkeypatch, *arguments, lines=lines) == 0
    said = capsys.readouterr()
    run = find_trained(runs["plain"])
    alone = adapters.load(run.load_base(), run.folder.adapter)
    tuned = generated(alone, run, prompt_of("alpaca"))
    base = generated(run.load_base(), run, prompt_of("alpaca"))
    assert said.out == f"{tuned}\n{base}\n"
    assert "no run has 'nobody'" in said.err
    assert "/what is not a command" in said.err
    assert "* base" in said.err


def test_what_a_temperature_draws_follows_the_seed(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed says the same, another seed something else."""
    said = []
    for seed in ("1", "1", "2"):
        options = ("--max-new-tokens", "9", "--temperature", "1.5", "--seed", seed)
        assert call(monkeypatch, runs["plain"], *options, lines=QUESTION) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_a_full_run_is_a_base_of_its_own(tmp_path: Path, runs: dict[str, Path]) -> None:
    """It answers alone by its own weights; there is no other base to switch to."""
    run = find_trained(full_copy(runs["plain"], tmp_path / "full"))
    talk = conversation.load([run])
    tuned = run.load_base()
    assert talk.answer(QUESTION, FEW, ignore) == generated(tuned, run, prompt_of("alpaca"))
    with pytest.raises(ValueError, match="tuned every weight"):
        talk.use("base")
    with pytest.raises(Refused, match="shares no base; chat with it alone"):
        conversation.load([find_trained(runs["plain"]), run])


def full_copy(run: Path, into: Path) -> Path:
    """Return a copy of a run as one that tuned every weight leaves it."""
    trained = find_trained(run)
    shutil.copytree(run, into, ignore=shutil.ignore_patterns("adapter"))
    adapted: Any = adapters.load(trained.load_base(), trained.folder.adapter)
    adapted.merge_and_unload().save_pretrained(into / "model")
    run_files.forget(into, "adapter")
    run_files.record(into, "model")
    change(into, "peft.method", "full")
    return into


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model.dtype", "bf16", "different bases (dtype); chat with each alone"),
        ("peft.method", "ia3", "are lora and ia3; chat with each method alone"),
    ],
)
def test_runs_that_share_no_base_or_method_are_refused(
    tmp_path: Path, runs: dict[str, Path], key: str, value: str, told: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line says what differs; exit code 2."""
    other = tmp_path / "other"
    shutil.copytree(runs["plain"], other)
    change(other, key, value)
    assert call(monkeypatch, runs["plain"], other) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_folder_without_a_trained_run_is_refused(
    tmp_path: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No run, one that has not finished training, and settings of no version of ours."""
    shutil.copytree(runs["plain"], tmp_path / "begun", ignore=shutil.ignore_patterns("adapter"))
    shutil.copytree(runs["plain"], tmp_path / "odd")
    change(tmp_path / "odd", "lora.rank", "3")
    for name, told in (
        ("nothing", "is not a run's folder: config.yaml is missing"),
        ("begun", "has no adapter yet (finished)"),
        ("odd", "cannot be read: Key 'rank' not in"),
    ):
        assert call(monkeypatch, tmp_path / name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line


@pytest.mark.parametrize("option", ["--max-new-tokens=0", "--temperature=-1", "--temperature=nan"])
def test_an_option_out_of_range_is_refused(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    assert call(monkeypatch, "outputs/run", option) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("module", ["chat", "export"])
def test_help_comes_without_torch(module: str) -> None:
    """Both commands explain themselves at once."""
    code = (
        f"import sys; sys.argv = ['x', '--help']; from finetune import {module}\n"
        f"try:\n    {module}.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"python -m finetune.{module}" in done.stdout
