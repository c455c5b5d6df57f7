"""Prompt templates: a row's fields become turns, and turns become tokens that are learned or not.

`alpaca` and `text` are plain text, `chat` is the tokenizer's own chat template over a row's
`messages`, and a user's `.jinja` file is a prompt that the row's `output` follows:

    Question: {{ question }}
    Answer:

Its variables are the fields; `data.columns` maps them, and `output`, to the data's columns. They
may be empty, and be lists or numbers. The output begins where the file ends: on a new line, if the
last one has its newline. `demo/question.jinja` is an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from finetune.config.paths import local_path
from finetune.config.schema import TEMPLATE_FILE
from finetune.data.chat_messages import render_chat
from finetune.data.chat_tokens import ask_chat, encode_chat
from finetune.data.plain_tokens import encode_pair, encode_pairs, encode_prompt
from finetune.data.turns import Encoded, Prompt, Turn, Unusable

# The wording of the Stanford Alpaca release (Taori et al. 2023).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PARTS = {  # whether there is an input -> first sentences, what is asked
    has_input: tuple(prompt.split("\n\n", 1))
    for has_input, prompt in ((True, ALPACA_WITH_INPUT), (False, ALPACA_WITHOUT_INPUT))
}
ALPACA_EARLIER = "### Instruction:\n{}\n\n### Response:\n{}\n\n"
# The same as jinja2, to render it without this project; a test holds both equal.
ALPACA_JINJA = """\
{%- if system -%}
{{ system }}
{%- elif input -%}
Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.
{%- else -%}
Below is an instruction that describes a task. Write a response that appropriately completes \
the request.
{%- endif -%}
{{ "\\n\\n" }}
{%- for asked, answered in history or [] -%}
### Instruction:
{{ asked }}

### Response:
{{ answered }}{{ "\\n\\n" }}
{%- endfor -%}
### Instruction:
{{ instruction }}{{ "\\n\\n" }}
{%- if input -%}
### Input:
{{ input }}{{ "\\n\\n" }}
{%- endif -%}
### Response:{{ "\\n" }}"""
PROMPT_FILE = "prompt.jinja"  # beside an adapter
SAMPLE_WORDS = 12  # of a plain text, for a model to go on from
# How a prompt's file is read.
JINJA: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Template:
    """One way of turning a row into tokens; `optional` fields may be absent from the data.

    All three functions raise Unusable where the row is at fault.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    render: Callable[[Fields], list[Turn]]
    encode: Callable[[Sequence[Turn], PreTrainedTokenizerBase], Encoded]
    ask: Callable[[Sequence[Turn], PreTrainedTokenizerBase], Prompt]  # up to the last response
    has_turns: bool = False  # several responses in a row, through the tokenizer's chat template
    file_text: str | None = None  # of a user's template
    known_text: str | None = None  # of a known one as jinja2; chat has none

    @property
    def jinja(self) -> str | None:
        """The prompt as a jinja2 file; None of chat, which the tokenizer has."""
        return self.file_text or self.known_text


def load_template(name: str) -> Template:
    """Return the template of `data.prompt_template`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no template, or not one of a prompt.
    """
    return _load_file(name) if name.endswith(TEMPLATE_FILE) else BY_NAME[name]


def save_prompt(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer, with its chat template, and the prompt of `data.prompt_template`.

    The prompt is a jinja2 file of the row's fields (`prompt.jinja`); `chat` is in the tokenizer.
    """
    tokenizer.save_pretrained(folder)
    text = load_template(name).jinja
    if text is not None:
        (folder / PROMPT_FILE).write_text(text, encoding="utf-8")


def render_alpaca(fields: Fields) -> list[Turn]:
    """Return the Alpaca prompt, with its input paragraph where there is an input, and response.

    As in LLaMA-Factory, a `system` text stands for the first sentences, and the pairs of `history`
    stand before the instruction.
    """
    texts = _texts(fields, required=("instruction", "output"), optional=("input", "system"))
    preface, asked = ALPACA_PARTS[bool(texts["input"])]
    asked = asked.format(**texts)
    if history := fields.get("history"):
        asked = "".join((*(ALPACA_EARLIER.format(*pair) for pair in history), asked))
    preface = texts["system"] or preface
    return [Turn("user", f"{preface}\n\n{asked}"), Turn("assistant", texts["output"])]


def render_text(fields: Fields) -> list[Turn]:
    """Return the text as something to say without being asked."""
    return [Turn("assistant", _texts(fields, required=("text",))["text"])]


def _texts(
    fields: Fields, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, str]:
    texts = {}
    for name in required:
        value = fields.get(name)
        if value is None:
            raise Unusable(f"{name} is null")
        if not isinstance(value, str):
            raise Unusable(f"{name} is not text")
        if not value or value.isspace():
            raise Unusable(f"{name} is empty")
        texts[name] = value
    for name in optional:
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            raise Unusable(f"{name} is not text")
        texts[name] = value or ""
    return texts


def _pair(turns: Sequence[Turn]) -> tuple[str, str]:
    """Return what stands before the response, and the response."""
    *before, answer = turns
    return "".join(turn.content for turn in before), answer.content


def encode_plain(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode prompt and response jointly, ended by the end-of-sequence token."""
    return encode_pair(*_pair(turns), tokenizer)


def encode_plain_rows(
    rows: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded | Unusable]:
    """Encode many rows at a time, each as `encode_plain` does, or return its fault."""
    try:
        return list(encode_pairs([_pair(turns) for turns in rows], tokenizer))
    except Unusable as fault:
        if len(rows) == 1:
            return [fault]
    half = len(rows) // 2  # to find the row that is at fault
    return [
        *encode_plain_rows(rows[:half], tokenizer), *encode_plain_rows(rows[half:], tokenizer)
    ]  # fmt: skip


def ask_plain(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the prompt, or where there is none the first words of the text."""
    asked, answer = _pair(turns)
    text = asked or " ".join(answer.split()[:SAMPLE_WORDS])
    return Prompt(text, encode_prompt(text, tokenizer))


def _load_file(name: str) -> Template:
    path = local_path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.prompt_template={name}: there is no file {path.absolute()}; give the path of a "
            f"jinja2 file that holds the prompt, or one of {', '.join(BY_NAME)}"
        )
    text = path.read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(**JINJA, undefined=StrictUndefined)
    try:
        parsed, template = environment.parse(text), environment.from_string(text)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"data.prompt_template={name}: line {error.lineno}: {error.message}"
        ) from None
    names = sorted(meta.find_undeclared_variables(parsed) - environment.globals.keys())
    if "output" in names or not names:
        fault = (
            "it holds {{ output }}; remove it, since the row's output is appended to the prompt"
            if names
            else "it names no field of a row; write at least one, such as {{ question }}"
        )
        raise ValueError(f"data.prompt_template={name}: {fault}")

    def render(fields: Fields) -> list[Turn]:
        output = _texts(fields, required=("output",))["output"]
        given = {name: "" if fields[name] is None else fields[name] for name in names}
        try:
            prompt = template.render(given)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise Unusable(f"the template fails: {error}") from None
        if not prompt.strip():
            raise Unusable("the prompt is empty")
        return [Turn("user", prompt), Turn("assistant", output)]

    return Template((*names, "output"), (), render, encode_plain, ask_plain, file_text=text)


BY_NAME = {
    "alpaca": Template(
        ("instruction", "output"),
        ("input", "system", "history"),
        render_alpaca,
        encode_plain,
        ask_plain,
        known_text=ALPACA_JINJA,
    ),
    "chat": Template(
        ("messages",),
        ("tools", "chat_template_kwargs"),
        render_chat,
        encode_chat,
        ask_chat,
        has_turns=True,
    ),
    "text": Template(("text",), (), render_text, encode_plain, ask_plain, known_text="{{ text }}"),
}
