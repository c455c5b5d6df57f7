"""`python -m finetune.preview`: rows as the model gets them, without a weight."""

from __future__ import annotations

import json
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from finetune import preview
from finetune.config.schema import ModelConfig
from finetune.data.dataset import read_sources
from finetune.data.row_prompts import sample_prompts
from finetune.models.base_model import find_model
from finetune.pipeline.row_preview import load_preview, print_preview
from tests.conftest import write_rows

ROWS: list[object] = [
    {"instruction": f"Say {n}.", "input": "", "output": f"It is {n}." if n % 4 else " "}
    for n in range(1, 13)
]
ALPACA = ("model=tiny", "data=local", "data.path=rows.jsonl")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Call the command; return exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["finetune.preview", *words])
    code = 0
    try:
        preview.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_rows_are_shown_with_counts_and_lengths(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learned tokens in brackets, each row with its number in the file, and why some are not."""
    code, out, _ = show(monkeypatch, capsys, *ALPACA, "--rows", "4")
    assert code == 0
    assert "12 rows read, 9 used, 3 dropped (output is empty; first: row 4)" in out
    assert "9 rows to train on, 0 to validate on" in out
    assert "0 of 9 rows (0.0%) are cut at training.max_length=512" in out
    assert "### Response:\n[It is 3.</s>]" in out
    assert [line.split(",")[0] for line in out.splitlines() if ", to train on" in line] == [
        "row 1", "row 2", "row 3", "row 5",
    ]  # fmt: skip


def test_json_has_one_object_a_row(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows unless --rows says how many; options may stand between overrides."""
    code, out, err = show(monkeypatch, capsys, "--json", *ALPACA)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [one["row"] for one in found] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert "9 used" in err
    for one in found:
        assert list(one) == ["row", "text", "input_ids", "labels", "tokens"]
        assert len(one["input_ids"]) == len(one["labels"]) == len(one["tokens"])
        learned = [token for token in one["labels"] if token != -100]
        assert one["input_ids"][-len(learned) :] == learned
        assert one["text"].endswith(f"It is {one['row']}.</s>")
    _, out, _ = show(monkeypatch, capsys, *ALPACA[:1], "--rows", "2", *ALPACA[1:], "--json")
    assert len(out.splitlines()) == 2


def test_a_mix_names_the_source_of_each_row(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row numbers alone would be ambiguous."""
    write_rows(rows.with_name("b.jsonl"), ROWS[:3])
    mix = ("model=tiny", "data=mix", "data.mix=[{path: rows.jsonl}, {path: b.jsonl}]")
    _, out, _ = show(monkeypatch, capsys, *mix, "--json")
    assert {json.loads(line)["source"].partition("=")[2] for line in out.splitlines()} == {
        "rows.jsonl", "b.jsonl",
    }  # fmt: skip
    _, out, _ = show(monkeypatch, capsys, *mix)
    assert " of data.mix" in out


def test_a_packed_run_is_shown_row_by_row(rows: Path) -> None:
    """The counts say what the rows are packed into."""
    shown = load_preview([*ALPACA, "training.sequence_packing=true"])
    assert len(list(shown.rows)) == 9
    assert "packed into" in shown.summary


def test_held_out_rows_are_named_so(rows: Path) -> None:
    """They come after the rows to train on."""
    shown = load_preview([*ALPACA, "data.validation_fraction=0.3", "data.heldout_fraction=0.2"])
    uses = [use for _, _, use in shown.rows]
    assert uses == ["to train on"] * 5 + ["to validate on"] * 2 + ["held out for evaluation"] * 2
    text = StringIO()
    print_preview(shown, 99, Console(file=text, width=100))
    assert text.getvalue().count("to validate on:") == 2
    assert text.getvalue().count("held out for evaluation:") == 2


def test_rows_of_a_validation_file_are_named_by_it(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their numbers are those of their own file, and samples are of them."""
    write_rows(rows.with_name("held_out.jsonl"), ROWS[:2])
    words = [*ALPACA, "data.validation_path=held_out.jsonl"]
    code, out, _ = show(monkeypatch, capsys, *words, "--rows", "99")
    assert code == 0
    assert "9 rows to train on, 2 to validate on" in out
    assert "row 2 of data.validation_path=held_out.jsonl, to validate on: " in out
    shown = load_preview(words)
    settings = shown.config.data, shown.config.training, shown.tokenizer
    asked = list(sample_prompts(read_sources(shown.sources), shown.examples, *settings))
    assert [one.row for one in asked] == [
        f"row {n} of data.validation_path=held_out.jsonl, held out for validation" for n in (2, 1)
    ]


def test_a_terminal_shows_colours(rows: Path) -> None:
    """Without colours, also on a terminal, there are brackets."""
    shown, texts = load_preview(ALPACA), []
    for settings in ({"force_terminal": True}, {"force_terminal": True, "no_color": True}):
        text = StringIO()
        console = Console(file=text, width=100, color_system="truecolor", **settings)  # type: ignore[arg-type]
        print_preview(shown, 1, console)
        texts.append(text.getvalue())
    assert "\x1b[30;42mIt is 1.</s>\x1b[0m" in texts[0]
    assert "[It is 1.</s>]" in texts[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("lora.rr=1",), "did you mean 'lora.r'?"),
        (("data.path=none.jsonl",), "none.jsonl"),
        (("data.prompt_template=text",), "text"),
        (("model.path=./none",), "model.path=./none"),
        (("training=none",), "training=none trains on no rows"),
        (("lora.r=1,2",), "several values are a sweep"),
        (("training.max_length=100000",), "was made for at most"),
        (("training.max_length=8",), "no row is left to train on"),
        (("--rows", "0"), "is not a number of rows"),
    ],
)
def test_refusals_are_those_of_the_other_commands(
    words: tuple[str, ...],
    expected: str,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, with the setting and a remedy, and nothing on standard output."""
    typed = {word.partition("=")[0]: word for word in (*ALPACA, *words) if "=" in word}
    flags = [word for word in words if "=" not in word]
    code, out, err = show(monkeypatch, capsys, *typed.values(), *flags)
    assert (code, out) == (2, "")
    assert expected in err
    assert "Traceback" not in err


def test_no_weight_is_loaded_and_the_demo_is_quick(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No loader of a model is called, and the demo's rows take less than three seconds."""
    find_model(ModelConfig(path="random://tiny"))  # it is written once, with its weights

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    started = time.monotonic()
    code, out, _ = show(monkeypatch, capsys, "model=tiny")
    assert time.monotonic() - started < 3
    assert code == 0
    assert "589 rows read, 240 used" in out
