"""The training's prompt as Ollama's TEMPLATE, rendered as Ollama renders it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from finetune.data.chat_tokens import Chat
from finetune.data.templates import load_template
from finetune.data.turns import Turn
from finetune.inference.ollama_prompt import build_prompt
from finetune.models.chat_templates import find_chat_template

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_DEFAULT = CHATML[CHATML.index("{% for") :]
# The system message is a part of the first question, and each question begins with BOS.
INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<turn>' + m['role'] + '\n' + (m['content'] | trim) + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
BRACES = (
    "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
)
ENDED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
THOUGHT = (  # of the last answer alone
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {
    "an end of the conversation": ENDED,
    "a thought in the last answer": THOUGHT,
    "chatml with a default system message": CHATML,
    "chatml": NO_DEFAULT,
    "system in the question, BOS in each": INSTRUCT,
    "no system role": NO_SYSTEM,
    "braces": BRACES,
}


def go(template: str, system: str, prompt: str, response: str | None) -> str:
    """Render the part of Go's templates that we write; without a response, up to its place."""
    values = {".System": system, ".Prompt": prompt, ".Response": response or "", '"{{"': "{{"}
    text, shown = "", [True]
    for part in re.split(r"(\{\{ .*? \}\})", template):
        action = part[3:-3] if part.startswith("{{ ") else None
        if action == "if .System":
            shown.append(bool(system))
        elif action == "else":
            shown[-1] = not shown[-1]
        elif action == "end":
            shown.pop()
        elif all(shown):
            if action == ".Response" and response is None:
                return text
            text += part if action is None else values[action]
    return text


def ollama(template: str, system: str, turns: Sequence[tuple[str, str | None]]) -> str:
    """Render a conversation as Ollama does: one template a question, the system message first."""
    return "".join(
        go(template, system if number == 0 else "", *turn) for number, turn in enumerate(turns)
    )


def let_add_bos(tokenizer: Any) -> None:
    """Make a tokenizer put its BOS before any text, as Llama's do."""
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Answer in verse."])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_chat_template_asks_as_in_training(
    kind: str, system: str, adds_bos: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A question, and another one after its answer; a BOS that Ollama adds is left out."""
    tokenizer.chat_template = TEMPLATES[kind]
    if adds_bos:
        let_add_bos(tokenizer)
    prompt = build_prompt("chat", tokenizer)
    if kind == "no system role" and not adds_bos:  # it writes a BOS before the first turn alone
        assert prompt.template is None
        return
    assert prompt.template is not None
    if kind == "no system role" and system:
        assert ".System" not in prompt.template
        return
    spoken = [("user", "Why?"), ("assistant", "So."), ("user", "And {{ .Prompt }}?")]
    answer = " So." if kind.startswith("system in") else "So."  # the space is the answer's there
    for count, turns in ((1, [("Why?", None)]), (3, [("Why?", answer), (spoken[2][1], None)])):
        messages = [{"role": role, "content": text} for role, text in spoken[:count]]
        before = [{"role": "system", "content": system}] if system else []
        wanted = str(
            tokenizer.apply_chat_template(
                before + messages, tokenize=False, add_generation_prompt=True
            )
        )
        found = ollama(prompt.template, system or prompt.system or "", turns)
        assert found == (wanted.removeprefix("<s>") if adds_bos else wanted)
    assert (prompt.note is not None) == (adds_bos and not wanted.startswith("<s>"))


def test_a_default_system_message_and_the_end_of_a_turn_are_carried_over(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """As SYSTEM and PARAMETER stop; an end that is no token of the vocabulary is none."""
    tokenizer.chat_template = CHATML
    assert build_prompt("chat", tokenizer).system == "Be kind."
    assert build_prompt("chat", tokenizer).stop is None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert build_prompt("chat", tokenizer).stop == "<|im_end|>"
    let_add_bos(tokenizer)
    for template in (NO_SYSTEM, INSTRUCT):
        tokenizer.chat_template = template
        assert build_prompt("chat", tokenizer).stop == "</s>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ m['role'] + m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages[-1:] %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
    ],
)
def test_a_chat_template_that_has_no_form_in_ollama_is_said(
    template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The base's template is used, and the Modelfile says so."""
    tokenizer.chat_template = template
    prompt = build_prompt("chat", tokenizer)
    assert prompt.template is None
    assert "cannot be written as Ollama's TEMPLATE" in str(prompt.note)


def test_alpaca_asks_as_in_training(tokenizer: PreTrainedTokenizerBase) -> None:
    """With a system message of its own, earlier turns too."""
    prompt, alpaca = build_prompt("alpaca", tokenizer), load_template("alpaca")
    assert prompt.template is not None
    assert prompt.system is not None
    fields = {"instruction": "And?", "output": "-", "history": [["Why?", "So."]]}
    for system in (None, "Answer in verse."):
        for given, turns in (
            ({**fields, "history": None}, [("And?", None)]),
            (fields, [("Why?", "So."), ("And?", None)]),
        ):
            wanted = alpaca.render({**given, "system": system})[0].content
            assert ollama(prompt.template, system or prompt.system, turns) == wanted


@pytest.mark.parametrize(
    ("text", "template", "note"),
    [
        ("Q: {{ question }}\nA:", "Q: {{ .Prompt }}\nA:{{ .Response }}", None),
        ("A {{ '{{x}}' }} {{ q }}:", 'A {{ "{{" }}x}} {{ .Prompt }}:{{ .Response }}', None),
        ("{{ q }} {{ q }}", "{{ .Prompt }}{{ .Response }}", "write the rendered prompt of q"),
        (
            "{{ context }} {{ question }}",
            "{{ .Prompt }}{{ .Response }}",
            "write the rendered prompt of context, question",
        ),
    ],
)
def test_a_prompt_file_with_one_field_is_a_template(
    text: str, template: str, note: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """One with several, or with the field twice, is left to the user, who is told."""
    (tmp_path / "prompt.jinja").write_text(text)
    prompt = build_prompt(str(tmp_path / "prompt.jinja"), tokenizer)
    assert prompt.template == template
    assert str(prompt.note).startswith(note or "None")


def test_plain_text_is_continued(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without a frame, as it was learned."""
    assert build_prompt("text", tokenizer).template == "{{ .Prompt }}{{ .Response }}"


SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_templates_of_known_models_ask_as_in_training(
    file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Those that TRL ships, where they have a form in Ollama."""
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    let_add_bos(tokenizer)
    prompt, template = build_prompt("chat", tokenizer), find_chat_template(tokenizer)
    if prompt.template is None:
        return
    for system in ("", "Answer in verse."):
        before = [Turn("system", system)] if system and ".System" in prompt.template else []
        messages = [turn.message for turn in (*before, Turn("user", "Why?"))]
        wanted = Chat(messages, template, tokenizer, None, {}).render(asks=True)
        found = ollama(prompt.template, system or prompt.system or "", [("Why?", None)])
        assert found == wanted.removeprefix("<s>")


def test_most_known_templates_have_a_form_in_ollama(tokenizer: PreTrainedTokenizerBase) -> None:
    """Llama 3, Gemma, Qwen and Phi among them."""
    let_add_bos(tokenizer)
    expressible = set()
    for file in SHIPPED:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        if build_prompt("chat", tokenizer).template is not None:
            expressible.add(file.stem)
    assert {"llama3", "gemma", "qwen2_5", "qwen3", "phi3"} <= expressible
    assert len(expressible) > len(SHIPPED) / 2
