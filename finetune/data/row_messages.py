"""Conversations in rows: ShareGPT, OpenAI, lists of turns or pairs, as messages or as fields.

A message is a plain dict; what it holds beside role and content stays in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.chat_messages import ALIASES, LEARNS, SPEECH
from finetune.data.turns import Unusable

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "bing": "assistant",
    "bard": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
FUNCTION_CALLS = ("function_call", "tool_call")  # LLaMA-Factory's: the value is a call in JSON
# Keys of an item that is a question with its answer, as in InternLM's and MOSS's rows.
PAIR_KEYS = (
    ("human", "assistant"), ("user", "assistant"), ("input", "output"), ("prompt", "response"),
    ("question", "answer"), ("instruction", "output"), ("prompt", "completion"),
)  # fmt: skip
NOT_ALTERNATING = "the conversation does not alternate between user and assistant"


def parse_json_text(value: Any) -> Any:
    """Return what JSON text in a column holds; other values as they are.

    A column of datasets' Sequence feature has a list for each key: it becomes a list of items.
    """
    if isinstance(value, Mapping) and _is_table(value):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _is_table(value: Mapping[str, Any]) -> bool:
    columns = list(value.values())
    are_lists = all(isinstance(column, list) for column in columns)
    return are_lists and len({len(column) for column in columns}) == 1


def find_messages_kind(value: Any) -> str | None:
    """Return the name of a conversation's format; None if it is no conversation."""
    turns = parse_json_text(value)
    if not isinstance(turns, list) or not turns:
        return None
    ending = " as JSON text" if isinstance(value, str) else ""
    first = turns[0]
    if isinstance(first, Mapping):
        if "from" in first:
            return f"ShareGPT{ending}"
        if "role" in first:
            return f"OpenAI messages{ending}"
        return f"question and answer pairs{ending}" if _pair_keys(first) else None
    if isinstance(first, list | str):
        return f"list of lists{ending}" if isinstance(first, list) else f"list of turns{ending}"
    return None


def build_messages(value: Any, column: str, system: Any = None) -> list[Any]:
    """Return a conversation as messages of role and content; an unknown item is kept.

    Args:
        value: the row's, a list or its JSON text.
        column: its name, for reasons.
        system: the row's own system prompt, put first where the conversation has none.
    """
    turns = parse_json_text(value)
    if turns is None:
        raise Unusable(f"{column} is null")
    if isinstance(turns, Mapping):
        raise Unusable(f"{column} is one message, not a list of them")
    if not isinstance(turns, list):
        raise Unusable(f"{column} is not a list")
    messages = _from_turns(turns)
    if system is not None and not isinstance(system, str):
        raise Unusable("system is not text")
    if system and system.strip() and not (messages and _role(messages[0]) == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _role(message: Any) -> Any:
    role = message.get("role") if isinstance(message, Mapping) else None
    name = role.strip().lower() if isinstance(role, str) else role
    return ALIASES.get(name, name) if isinstance(name, str) else name


def _from_turns(turns: Sequence[Any]) -> list[Any]:
    if turns and all(isinstance(turn, str) for turn in turns):
        return [_said(number, turn) for number, turn in enumerate(turns)]
    messages: list[Any] = []
    for turn in turns:
        keys = _pair_keys(turn) if isinstance(turn, Mapping) else None
        if isinstance(turn, list) and len(turn) == 2:
            messages += [_said(number, text) for number, text in enumerate(turn)]
        elif keys:
            if turn.get("system"):
                messages.append({"role": "system", "content": turn["system"]})
            messages += [_said(number, turn[key]) for number, key in enumerate(keys)]
        else:
            messages.append(_from_sharegpt(turn) if isinstance(turn, Mapping) else turn)
    return messages


def _said(number: int, text: Any) -> dict[str, Any]:
    return {"role": ("user", "assistant")[number % 2], "content": text}


def _pair_keys(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    if "role" in turn or "from" in turn:
        return None
    return next((keys for keys in PAIR_KEYS if set(keys) <= turn.keys()), None)


def _from_sharegpt(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a turn of ShareGPT {from, value} as a message; one of OpenAI's stays as it is."""
    if "from" not in turn or "role" in turn:
        return turn
    speaker = turn["from"]
    content = turn["value"] if "value" in turn else turn.get("content")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "content")}
    if speaker in FUNCTION_CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content), **rest}
    role = SHAREGPT_ROLES.get(speaker.lower(), speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": content, **rest}


def _calls(text: Any) -> list[Any]:
    """Return the calls that LLaMA-Factory's rows write as JSON: {name, arguments}, or several."""
    calls = parse_json_text(text)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, Mapping) or not {"name", "arguments"} <= call.keys():
            raise Unusable("conversations has a function_call that is not JSON of name, arguments")
    return [{"type": "function", "function": call} for call in calls]


def build_pairs(history: Any) -> list[tuple[str, str]]:
    """Return Alpaca's `history` as pairs of what was asked and answered."""
    rounds = parse_json_text(history)
    if rounds is None or rounds == "":
        return []
    if not isinstance(rounds, list):
        raise Unusable("history is not a list of pairs")
    messages = _from_turns(rounds)
    if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages):
        raise Unusable("history is not a list of pairs of texts")
    roles, texts = [m.get("role") for m in messages], [m["content"] for m in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unusable("history is not a list of pairs")
    return list(zip(texts[::2], texts[1::2], strict=True))


def fields_of_messages(messages: Sequence[Any]) -> dict[str, Any]:
    """Return a conversation as Alpaca's fields: its last exchange, and those before as history."""
    turns = [(_role(message), _text(message)) for message in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] in ("system", "developer") else ""
    roles = [role for role, _ in turns]
    if "tool" in roles:
        raise Unusable("a turn has the role tool, which needs data.prompt_template=chat")
    for message in messages:
        _refuse_beside_text(message)
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unusable(NOT_ALTERNATING)
    texts = [text for _, text in turns]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    asked, answer = pairs.pop()
    return {
        "instruction": asked, "input": "", "output": answer, "system": system, "history": pairs,
    }  # fmt: skip


def _refuse_beside_text(message: Any) -> None:
    """Raise Unusable where a message says more than its text, which a plain prompt would lose."""
    if not isinstance(message, Mapping):
        return
    more = next((key for key in SPEECH if message.get(key)), None)
    more = more or next((key for key in LEARNS if message.get(key, True) in (0, False)), None)
    if more is not None:
        raise Unusable(f"a turn has {more}, which needs data.prompt_template=chat")


def _text(message: Any) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    return content


def messages_of_fields(fields: Mapping[str, Any]) -> list[Any]:
    """Return Alpaca's fields as a conversation; the input follows the instruction on a new line."""
    for name in ("instruction", "output"):
        if fields.get(name) is None:
            raise Unusable(f"{name} is null")
    for name in ("system", "input", "instruction", "output"):
        if not isinstance(fields.get(name), str | None):
            raise Unusable(f"{name} is not text")
    asked = "\n".join(text for text in (fields["instruction"], fields.get("input")) if text)
    messages = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    for question, answer in fields.get("history") or ():
        messages += [_said(0, question), _said(1, answer)]
    return [*messages, _said(0, asked), _said(1, fields["output"])]
