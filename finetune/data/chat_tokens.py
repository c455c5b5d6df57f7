"""Tokens of conversations by the chat template in force, and which of them are responses.

Where the template marks the assistant's turns (`{% generation %}`), the marks are used. Otherwise a
response is the text that a turn adds to the rendered turns before it. What the template does not
render of a message is named in `Encoded.notes`, and an answer of which it renders nothing is not
learned.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import TEMPLATE_FILE
from finetune.data import chat_messages
from finetune.data.chat_messages import REASONING, SPEECH, Messages
from finetune.data.text_sections import count_common, encode_texts, sized_parts
from finetune.data.turns import SURROGATE, Encoded, Prompt, Turn, Unusable, holds_surrogate
from finetune.models.chat_templates import TEMPLATE_ERRORS, ChatTemplate, ChatTemplates

REWRITES = "the chat template renders earlier turns differently when later ones follow"
NOT_SHOWN = "the chat template renders no answer of the row"
NOT_MARKED = "the chat template marks no response"
JOINED = "the chat template has no system role, and the system turn was joined to the user's"
THOUGHTS = re.compile(r"^(.*?)</think>", re.DOTALL)
EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")
PROBE = {"role": "user", "content": "-"}

Message = dict[str, Any]
Repair = Callable[[Sequence[Message]], list[Message]]
Span = tuple[int, int]  # the first place, and the one after the last


@dataclass(frozen=True)
class Chat:
    """One conversation, its template, and the tokenizer."""

    messages: list[Message]
    template: ChatTemplate
    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def render(self, count: int | None = None, *, asks: bool = False) -> str:
        """Return the text of the first messages, all by default; raises Unusable."""
        return str(self._apply(self.messages[:count], tokenize=False, add_generation_prompt=asks))

    def marked(self) -> tuple[list[int], list[bool]]:
        """Return tokens and the template's marks of the assistant's; raises Unusable."""
        found = self._apply(self.messages, return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], [bool(mark) for mark in found["assistant_masks"]]

    def tokens(self, text: str) -> list[int]:
        if holds_surrogate(text):
            raise Unusable(SURROGATE)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return tokens

    def _apply(self, messages: Sequence[Message], **settings: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                chat_messages.with_reasoning(messages),
                tools=self.tools,
                chat_template=self.template.text,
                **{**self.settings, **settings},
            )
        except TEMPLATE_ERRORS as error:
            raise Unusable(_refusal(error, self)) from None


def _refusal(error: Exception, chat: Chat) -> str:
    if holds_surrogate([chat.messages, chat.tools]):
        return SURROGATE
    verb = "refuses it" if isinstance(error, TemplateError) else "fails"
    return f"the chat template {verb}: {' '.join(str(error).split())}"


@dataclass(frozen=True)
class _Rendered:
    """A conversation's text, and the spans of the messages whose tokens are needed."""

    chat: Chat
    text: str
    places: Mapping[int, Span]  # of the messages' numbers, in characters
    unlearned: Sequence[int]
    unused: Sequence[str]
    marked: tuple[list[int], list[bool]] | None  # tokens and marks of a template that has marks

    @property
    def texts(self) -> list[str]:
        """Return the texts to tokenise: the conversation, and its prefixes up to each place."""
        complete = [self.text] if self.marked is None else []
        return complete + [self.text[:place] for span in self.places.values() for place in span]


def encode_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode a conversation by the chat template in force; each assistant turn is a response."""
    (found,) = encode_chats([turns], tokenizer)
    if isinstance(found, Unusable):
        raise found
    return found


def encode_chats(
    rows: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded | Unusable]:
    """Encode many conversations at a time, or return the fault of each that has one."""
    templates = ChatTemplates(tokenizer)
    rendered = (_render_or_fault(turns, templates) for turns in rows)
    parts = sized_parts(rendered, _num_characters)
    return [one for part in parts for one in _encode(part, tokenizer)]


def _render_or_fault(turns: Sequence[Turn], templates: ChatTemplates) -> _Rendered | Unusable:
    try:
        return _render(turns, templates)
    except Unusable as fault:
        return fault


def _num_characters(row: _Rendered | Unusable) -> int:
    return 0 if isinstance(row, Unusable) else sum(map(len, row.texts))


def _encode(
    rows: Sequence[_Rendered | Unusable], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Encoded | Unusable]:
    texts = [text for row in rows if isinstance(row, _Rendered) for text in row.texts]
    encoded = iter(encode_texts(texts, tokenizer, add_special_tokens=False) if texts else ())
    for row in rows:
        if isinstance(row, Unusable):
            yield row
            continue
        try:
            yield _mark(row, list(islice(encoded, len(row.texts))))
        except Unusable as fault:
            yield fault


def _render(turns: Sequence[Turn], templates: ChatTemplates) -> _Rendered:
    chat, text = _fit(turns, templates)
    is_marked = chat.template.marks_responses and templates.tokenizer.is_fast
    marked = chat.marked() if is_marked else None
    if holds_surrogate(text):
        raise Unusable(SURROGATE)
    unused = list(_find_unused(chat, text))
    silent = [number for number, _ in enumerate(chat.messages) if _is_silent(chat, number, unused)]
    unlearned = sorted({*silent, *_find_unlearned(turns, chat)})
    answers = [] if marked else [n for n, one in enumerate(chat.messages) if _is_answer(one)]
    places = {
        number: (_find_start(chat, text, number), _find_end(chat, text, number))
        for number in dict.fromkeys([*answers, *unlearned])
    }
    return _Rendered(chat, text, places, unlearned, unused, marked)


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _mark(row: _Rendered, encoded: Sequence[list[int]]) -> Encoded:
    """Mark the response tokens; a token across the start of a response belongs to it."""
    (tokens, marks), prefixes = row.marked or (encoded[0], []), encoded[row.marked is None :]
    ends = [count_common(prefix, tokens) for prefix in prefixes]
    spans = {n: (a, max(a, b)) for n, a, b in zip(row.places, ends[::2], ends[1::2], strict=True)}
    if row.marked is None:
        marks = [False] * len(tokens)
        for number, (start, end) in spans.items():
            if _is_answer(row.chat.messages[number]):
                marks[start:end] = [True] * (end - start)
    unlearned = tuple(spans[number] for number in row.unlearned)
    if not _without(marks, unlearned).count(True):
        raise Unusable(NOT_SHOWN if any(marks) else NOT_MARKED)
    unused = [f"the chat template does not use {name}" for name in row.unused]
    notes = (*row.chat.template.notes, *row.chat.notes, *unused)
    return Encoded(tokens, marks, notes, unlearned)


def ask_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the prompt of the last assistant turn."""
    last = max(number for number, turn in enumerate(turns) if turn.role == "assistant")
    if not last:
        raise Unusable("messages has no turn before its only assistant turn")
    asked = list(turns[:last])
    if isinstance(turns, Messages):
        asked = Messages(asked, turns.tools, turns.settings)
    chat, _ = _fit(asked, ChatTemplates(tokenizer))
    tokens = chat.tokens(chat.render(asks=True))
    return Prompt(str(tokenizer.decode(tokens)), tokens)


def _fit(turns: Sequence[Turn], templates: ChatTemplates) -> tuple[Chat, str]:
    """Return the conversation in a form that its template renders completely, and its text.

    Where the template fails, or leaves something out, REPAIRS rewrite the messages.
    """
    tools = turns.tools if isinstance(turns, Messages) else None
    settings = turns.settings if isinstance(turns, Messages) else {}
    template = templates.find(has_tools=tools is not None)
    messages = [turn.message for turn in turns]
    chat = Chat(messages, template, templates.tokenizer, tools, settings)
    text, fault = _try(chat)
    for is_needed, repair, note in REPAIRS:
        if is_needed(chat, text):
            repaired = replace(chat, messages=repair(chat.messages), notes=(*chat.notes, *note))
            other, why = _try(repaired)
            if other is not None or text is None:
                chat, text, fault = repaired, other, why
    if text is None:
        raise Unusable(fault)
    return chat, text


def _try(chat: Chat) -> tuple[str | None, str]:
    try:
        return chat.render(), ""
    except Unusable as fault:
        return None, str(fault)


def _quotes_arguments(chat: Chat, text: str | None) -> bool:
    """Return whether arguments that are JSON text fail, or would be JSON text of JSON text."""
    arguments = chat_messages.argument_texts(chat.messages)
    return bool(arguments) and (
        text is None or any(json.dumps(one, ensure_ascii=False) in text for one in arguments)
    )


def _fails_at_null(chat: Chat, text: str | None) -> bool:
    return text is None and any(one["content"] is None for one in chat.messages)


def _drops_developer(chat: Chat, text: str | None) -> bool:
    return any(
        one["role"] == "developer" and not _is_shown(one["content"], text) for one in chat.messages
    )


def _fails_at_empty_system(chat: Chat, text: str | None) -> bool:
    begins = chat_messages.begins_with_system(chat.messages)
    return text is None and begins and not chat.messages[0]["content"].strip()


def _drops_system(chat: Chat, text: str | None) -> bool:
    return chat_messages.begins_with_system(chat.messages) and not _is_shown(
        chat.messages[0]["content"], text
    )


# Condition, repair and notes; applied in this order, each to the result of those before it.
REPAIRS: tuple[tuple[Callable[[Chat, str | None], bool], Repair, tuple[str, ...]], ...] = (
    (_quotes_arguments, chat_messages.with_objects, ()),
    (_fails_at_null, chat_messages.with_empty_contents, ()),
    (_drops_developer, chat_messages.with_system_role, ()),
    (_fails_at_empty_system, chat_messages.with_joined_system, ()),
    (_drops_system, chat_messages.with_joined_system, (JOINED,)),
)


def _is_shown(value: str | None, text: str | None) -> bool:
    """Return whether a rendered text contains a value, as it is or as a JSON string."""
    said = (value or "").strip()
    return text is not None and (
        said in text or any(json.dumps(said, ensure_ascii=a)[1:-1] in text for a in (False, True))
    )


def _find_unused(chat: Chat, text: str) -> Iterator[str]:
    """Yield the names of the fields and turns of messages that the text does not show."""
    names = dict.fromkeys(name for one in chat.messages for name, value in one.items() if value)
    for name in names:
        if name in REASONING:
            values = [str(one[name]) for one in chat.messages if one.get(name)]
            if not all(_is_shown(value, text) for value in values):
                yield name
        elif name not in ("role", "content") and _renders(chat, without=name) == text:
            yield name
    if chat.tools and _try(replace(chat, tools=None))[0] == text:
        yield "tools"
    for role in dict.fromkeys(one["role"] for one in chat.messages):
        contents = [one["content"] or "" for one in chat.messages if one["role"] == role]
        spoken = [content.rpartition("</think>")[2] for content in contents]
        if not all(_is_shown(content, text) for content in spoken):
            yield f"the text of {role} turns"
    if not all(_is_shown(thought, text) for thought in _thoughts(chat.messages)):
        yield "thoughts in <think>"


def _renders(chat: Chat, *, without: str) -> str | None:
    messages = [{k: v for k, v in one.items() if k != without} for one in chat.messages]
    return _try(replace(chat, messages=messages))[0]


def _thoughts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        found = (
            THOUGHTS.search(message["content"] or "") if message["role"] == "assistant" else None
        )
        if found:
            yield found[1].replace("<think>", "")


def _is_silent(chat: Chat, number: int, unused: Sequence[str]) -> bool:
    """Return whether a message is an answer of which the template renders nothing."""
    message = chat.messages[number]
    said = [name for name in SPEECH if message.get(name) and name not in unused]
    return message["role"] == "assistant" and not (message["content"] or "").strip() and not said


def _find_unlearned(turns: Sequence[Turn], chat: Chat) -> list[int]:
    """Return the indices of messages without loss, counted after a system turn was joined."""
    joined = len(turns) - len(chat.messages)
    return [n - joined for n, turn in enumerate(turns) if not turn.is_learned and n >= joined]


def _find_start(chat: Chat, text: str, number: int) -> int:
    """Return where a response begins, after its generation prompt; raises Unusable (REWRITES)."""
    if not number:
        opening = replace(chat, messages=[PROBE])
        cue = opening.render(asks=True).removeprefix(opening.render())
        return max(text.find(cue), 0) + len(cue)
    asked = chat.render(number, asks=True)
    if text.startswith(asked):
        return len(asked)
    if not text.startswith(chat.render(number)):
        raise Unusable(REWRITES)
    pairs = zip(text, asked, strict=False)  # the prompt begins the answer, such as by <think>
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _find_end(chat: Chat, text: str, number: int) -> int:
    if number + 1 == len(chat.messages):
        return len(text)
    after = chat.render(number + 1)
    if not text.startswith(after):  # some end only the last turn in the EOS
        after = after.removesuffix(str(chat.tokenizer.eos_token))
    if not text.startswith(after):
        raise Unusable(REWRITES)
    return len(after)


def _without(marks: Sequence[bool], spans: Sequence[Span]) -> list[bool]:
    kept = list(marks)
    for start, end in spans:
        kept[start:end] = [False] * (end - start)
    return kept


def find_learned(
    encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, prompt: bool, empty_think: bool
) -> list[bool]:
    """Return the mask of the tokens that are learned.

    Args:
        encoded: a row's tokens.
        tokenizer: that made them.
        prompt: whether the prompt is learned too.
        empty_think: whether an empty think block of a response is learned.
    """
    marks = [True] * len(encoded.tokens) if prompt else encoded.is_response
    learned = _without(marks, encoded.unlearned)
    return learned if empty_think else _without(learned, _empty_thinks(encoded.tokens, tokenizer))


def _empty_thinks(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    pieces = [str(tokenizer.decode([token])) for token in tokens]
    ends = list(accumulate(map(len, pieces), initial=0))
    blocks = [block.span() for block in EMPTY_THINK.finditer("".join(pieces))]
    return [(bisect_left(ends, start), bisect_right(ends, end) - 1) for start, end in blocks]


def find_chat_problems(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return why conversations cannot be encoded with the tokenizer."""
    remedy = (
        f"set model.chat_template=FILE{TEMPLATE_FILE}, use a model that has a chat template to "
        f"train on, or write single turns as a prompt: data.prompt_template=FILE{TEMPLATE_FILE}"
    )
    if not tokenizer.chat_template:
        return [f"data.prompt_template=chat: the model's tokenizer has no chat template; {remedy}"]
    try:
        encoded = encode_chat(
            [Turn("user", "What is it?"), Turn("assistant", "It is this.")], tokenizer
        )
    except Unusable as error:
        return [f"data.prompt_template=chat: {error}; {remedy}"]
    pairs = zip(encoded.tokens, encoded.is_response, strict=True)
    learned = {token for token, is_response in pairs if is_response}
    if not learned & {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}:
        fault = "the chat template ends a response with no special token to learn as its end"
        return [f"data.prompt_template=chat: {fault}; {remedy}"]
    return []
