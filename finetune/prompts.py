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

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from finetune.config import TEMPLATE_FILE, local_path

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
ROLES = ("system", "user", "assistant")
SAMPLE_WORDS = 12  # of a plain text, for a model to go on from
# As transformers looks for it, before it can tell the assistant's tokens from the others.
MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")
REWRITES = "the chat template writes earlier turns anew when others follow"

Fields = Mapping[str, Any]


class Unusable(ValueError):
    """A row that cannot be learned from; the message is the reason it is counted under."""


class Turn(NamedTuple):
    """What one side says; plain text has at most a user's turn and the assistant's."""

    role: str
    content: str


@dataclass(frozen=True)
class Encoded:
    """A row's tokens; `is_response` is as long, and true where the assistant speaks."""

    tokens: list[int]
    is_response: list[bool]


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, as text and as the tokens it sees."""

    text: str
    tokens: list[int]


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


def load_template(name: str) -> Template:
    """Return the template of `data.prompt_template`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no template, or not one of a prompt.
    """
    return _load_file(name) if name.endswith(TEMPLATE_FILE) else BY_NAME[name]


def render_alpaca(fields: Fields) -> list[Turn]:
    """Return the Alpaca prompt, with its input paragraph where there is an input, and response."""
    texts = _texts(fields, required=("instruction", "output"), optional=("input",))
    prompt = ALPACA_WITH_INPUT if texts["input"] else ALPACA_WITHOUT_INPUT
    return [Turn("user", prompt.format(**texts)), Turn("assistant", texts["output"])]


def render_text(fields: Fields) -> list[Turn]:
    """Return the text as something to say without being asked."""
    return [Turn("assistant", _texts(fields, required=("text",))["text"])]


def _texts(
    fields: Fields, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, str]:
    for name in (*required, *optional):
        value = fields[name]
        if value is None:
            if name in required:
                raise Unusable(f"{name} is null")
        elif not isinstance(value, str):
            raise Unusable(f"{name} is not text")
        elif name in required and not value.strip():
            raise Unusable(f"{name} is empty")
    return {name: fields[name] or "" for name in (*required, *optional)}


def encode_plain(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode prompt and response apart, ended by the end-of-sequence token.

    So the border between them is the one that a generation from the prompt sees.
    """
    *before, answer = turns
    asked = tokenizer("".join(turn.content for turn in before))["input_ids"]
    answered = tokenizer(answer.content, add_special_tokens=False)["input_ids"]
    answered = [*answered, tokenizer.eos_token_id]
    return Encoded([*asked, *answered], [False] * len(asked) + [True] * len(answered))


def ask_plain(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the prompt, or where there is none the first words of the text."""
    *before, answer = turns
    text = "".join(turn.content for turn in before)
    text = text or " ".join(answer.content.split()[:SAMPLE_WORDS])
    return Prompt(text, tokenizer(text)["input_ids"])


def render_chat(fields: Fields) -> list[Turn]:
    """Return the row's `messages`, each {role, content}, as they are."""
    messages = fields["messages"]
    if messages is None:
        raise Unusable("messages is null")
    if not isinstance(messages, list):
        raise Unusable("messages is not a list")
    turns = [_turn(message) for message in messages]
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise Unusable("messages has no assistant turn")
    if roles[0] == "assistant":
        raise Unusable("messages begins with an assistant turn")
    return turns


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise Unusable("messages has an item without role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise Unusable(f"messages has another role than {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise Unusable("messages has a content that is not text")
    if not content.strip():
        raise Unusable("messages has an empty content")
    return Turn(role, content)


def encode_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode a conversation by the tokenizer's chat template; each assistant turn is a response.

    A template that marks the assistant's turns (`{% generation %}`) is believed. With another, a
    response is what a turn adds to the prompt that the turns before it make.
    """
    if MARKS_ASSISTANT.search(tokenizer.get_chat_template()):
        marked = _apply(turns, tokenizer, return_assistant_tokens_mask=True)
        return Encoded(marked["input_ids"], [bool(mark) for mark in marked["assistant_masks"]])
    tokens = _apply(turns, tokenizer)["input_ids"]
    is_response = [False] * len(tokens)
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            before = _apply(turns[:number], tokenizer, add_generation_prompt=True)["input_ids"]
            after = _apply(turns[: number + 1], tokenizer)["input_ids"]
            if tokens[: len(after)] != after or after[: len(before)] != before:
                raise Unusable(REWRITES)
            is_response[len(before) : len(after)] = [True] * (len(after) - len(before))
    return Encoded(tokens, is_response)


def ask_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the conversation up to where the assistant speaks last."""
    last = max(number for number, turn in enumerate(turns) if turn.role == "assistant")
    tokens = _apply(turns[:last], tokenizer, add_generation_prompt=True)["input_ids"]
    return Prompt(str(tokenizer.decode(tokens)), tokens)


def _apply(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
    return_assistant_tokens_mask: bool = False,
) -> Mapping[str, list[int]]:
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [turn._asdict() for turn in turns],
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
        )
    except TemplateError as error:
        raise Unusable(f"the chat template refuses it: {error}") from None
    found: Mapping[str, list[int]] = encoded
    return found


def find_chat_problems(tokenizer: PreTrainedTokenizerBase, *, num_responses: int) -> list[str]:
    """Return why the tokenizer cannot encode conversations of so many responses."""
    remedy = (
        "use a model that has a chat template to train on, "
        f"or write single turns as a prompt: data.prompt_template=FILE{TEMPLATE_FILE}"
    )
    if not tokenizer.chat_template:
        return [f"data.prompt_template=chat: the model's tokenizer has no chat template; {remedy}"]
    exchange = [Turn("user", "What is it?"), Turn("assistant", "It is this.")]
    try:
        encoded = encode_chat(exchange * num_responses, tokenizer)
    except Unusable as error:
        return [f"data.prompt_template=chat: {error}; {remedy}"]
    learned = {t for t, own in zip(encoded.tokens, encoded.is_response, strict=True) if own}
    if not learned & {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}:
        fault = "the chat template ends a response with no special token, to learn stopping from"
        return [f"data.prompt_template=chat: {fault}; {remedy}"]
    return []


def _load_file(name: str) -> Template:
    path = local_path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.prompt_template={name}: there is no file {path.absolute()}; give the path of a "
            f"jinja2 file that holds the prompt, or one of {', '.join(BY_NAME)}"
        )
    text = path.read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    try:
        parsed, template = environment.parse(text), environment.from_string(text)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"data.prompt_template={name}: line {error.lineno}: {error.message}"
        ) from None
    names = sorted(meta.find_undeclared_variables(parsed) - environment.globals.keys())
    if "output" in names or not names:
        fault = "holds {{ output }}" if names else "names no field, such as {{ question }}"
        raise ValueError(
            f"data.prompt_template={name}: it {fault}; it is the prompt of a row, which the "
            "row's output follows by itself"
        )

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
        ("instruction", "output"), ("input",), render_alpaca, encode_plain, ask_plain
    ),
    "chat": Template(("messages",), (), render_chat, encode_chat, ask_chat, has_turns=True),
    "text": Template(("text",), (), render_text, encode_plain, ask_plain),
}
