"""The chat template in force: a file's, a training variant, a fixed date, and the identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from finetune.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig
from finetune.models.base_model import find_model, load_tokenizer
from finetune.models.chat_templates import find_chat_template, fix_date, read_chat_template
from finetune.pipeline import preflight
from finetune.pipeline.identity import find_inputs
from tests.conftest import train_tiny, write_rows

FOLDER = Path(trl.__file__).parent / "chat_templates"
TURNS = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
]


def chat_config(folder: Path, **model: Any) -> Config:
    path = write_rows(folder / "rows.jsonl", ROWS * 4)
    return Config(
        model=ModelConfig(path="random://tiny", **model),
        data=DataConfig(path=str(path), prompt_template="chat"),
        evaluation=EvaluationConfig(tasks=[]),
        output_dir=str(folder / "outputs"),
    )


def template_file(folder: Path, text: str) -> str:
    path = folder / "chat.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages", "line 1: unexpected end of template"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("Hello.", "it does not use `messages`"),
        (None, "there is no file"),
        (b"{{ messages }} \xff", "the file is not UTF-8"),
    ],
)
def test_a_file_that_is_no_chat_template_is_refused(
    tmp_path: Path, text: str | bytes | None, message: str
) -> None:
    """Before the start, once and in one line."""
    path = tmp_path / "chat.jinja"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (problem,) = preflight.prepare(chat_config(tmp_path, chat_template=str(path))).problems
    assert problem.startswith(f"model.chat_template={path}: {message}")
    assert "\n" not in problem


def test_a_file_with_what_transformers_adds_to_jinja_is_read(tmp_path: Path) -> None:
    """Marks of responses, loop controls, the clock, and refusals of its own."""
    text = (
        "{% if not messages %}{{ raise_exception('none') }}{% endif %}{{ strftime_now('%Y') }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% break %}{% endfor %}"
    )
    assert read_chat_template(template_file(tmp_path, text)) == text


def test_the_tokenizer_takes_the_file(tmp_path: Path) -> None:
    """So does all that loads it: training, evaluation, chat, export."""
    model = ModelConfig(path="random://tiny", chat_template=template_file(tmp_path, TURNS))
    assert load_tokenizer(model, find_model(model)).chat_template == TURNS


def test_a_run_is_named_by_the_template_in_force(tmp_path: Path) -> None:
    """By its content, not by its path; not where nothing is asked by it."""
    stock = find_inputs(chat_config(tmp_path)).identity
    name = template_file(tmp_path, TURNS)
    own = find_inputs(chat_config(tmp_path, chat_template=name))
    assert own.identity != stock
    assert set(own.files) == {"model.chat_template"}
    (tmp_path / "elsewhere").mkdir()
    there = template_file(tmp_path / "elsewhere", TURNS)
    assert find_inputs(chat_config(tmp_path, chat_template=there)).identity == own.identity
    other = template_file(tmp_path / "elsewhere", TURNS + " ")
    assert find_inputs(chat_config(tmp_path, chat_template=other)).identity != own.identity


def test_a_day_changes_neither_tokens_nor_identity(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that prints the date prints the same one each day."""

    class Later(chat_template_utils.datetime):  # type: ignore[misc, name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 5, 6)

    config = chat_config(
        tmp_path, chat_template=template_file(tmp_path, "{{ strftime_now('%d %b %Y') }}" + TURNS)
    )
    tokenizer.chat_template = (FOLDER / "llama3_2.jinja").read_text(encoding="utf-8")

    def prompt() -> Any:
        return tokenizer.apply_chat_template(
            ROWS[0]["messages"], chat_template=find_chat_template(tokenizer).text, tokenize=False
        )

    before = find_inputs(config).identity, prompt()
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert (find_inputs(config).identity, prompt()) == before
    assert "Today Date: 26 Jul 2024" in before[1]
    assert find_chat_template(tokenizer).has_date


def test_a_date_in_any_format_is_fixed() -> None:
    """Also one that the template works out."""
    assert fix_date("{{ strftime_now( '%Y-%m' ) }}") == '{{ "2024-07" }}'
    text = fix_date("{% set f = '%Y' %}{{ messages[0].content }}{{ strftime_now(f) }}")
    found: Any = chat_template_utils.render_jinja_template(
        [ROWS[0]["messages"]], chat_template=text
    )
    assert found[0] == ["Hi26 Jul 2024"]


def test_a_run_keeps_its_chat_template(tmp_path: Path) -> None:
    """The file may be gone when the run is talked to."""
    from finetune.inference.trained import find_trained

    name = template_file(tmp_path, TURNS)
    path = write_rows(tmp_path / "rows.jsonl", ROWS * 4)
    run = train_tiny(
        tmp_path,
        model=ModelConfig(path="random://tiny", chat_template=name),
        data=DataConfig(path=str(path), prompt_template="chat"),
    )
    Path(name).unlink()
    trained = find_trained(run)
    assert trained.config.model.chat_template == str(run / "chat_template.jinja")
    assert trained.load_tokenizer().chat_template == TURNS
