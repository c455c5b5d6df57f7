"""Chat messages of a row, validated: roles, contents, other fields, which turns are learned.

Beside role and content a message may have any field that a chat template reads (`tool_calls`,
`reasoning_content`, `name`); `weight: 0` and `train: false` take a message out of the loss. The
row's `tools` and `chat_template_kwargs` go to the template too, as in TRL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.data.turns import Turn, Unusable

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant"}
MAY_BE_EMPTY = ("system", "developer", "tool", "ipython", "function")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names for the same
SPEECH = ("tool_calls", "function_call", *REASONING)  # stand for an answer's content
LEARNS = ("weight", "train", "training")  # OpenAI's name and Axolotl's two


class Messages(list[Turn]):
    """A conversation's turns, with the tools and arguments of its chat template."""

    def __init__(
        self,
        turns: Iterable[Turn],
        tools: list[Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(turns)
        self.tools = tools
        self.settings = dict(settings or {})


def render_chat(fields: Mapping[str, Any]) -> list[Turn]:
    """Return the row's `messages` and tools as turns; raises Unusable where one is invalid."""
    messages = fields["messages"]
    if messages is None:
        raise Unusable("messages is null")
    if not isinstance(messages, list):
        raise Unusable("messages is not a list")
    turns = [_turn(message) for message in messages]
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise Unusable("messages has no assistant turn")
    if not any(turn.is_learned for turn in answers):
        raise Unusable("messages has no assistant turn to learn (weight: 0, train: false)")
    settings = _parsed(fields.get("chat_template_kwargs")) or {}
    if not isinstance(settings, Mapping):
        raise Unusable("chat_template_kwargs is not an object")
    return Messages(turns, _tools(fields.get("tools")), settings)


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping) or not _is_message(message):
        raise Unusable("messages has an item without role and content")
    role = _role(message["role"])
    content = _text(message.get("content"))
    extra = {
        name: value
        for name, value in message.items()
        if value is not None and name not in ("role", "content", *LEARNS)
    }
    if "tool_calls" in extra:
        extra["tool_calls"] = _parsed(extra["tool_calls"])
    if not any(extra.get(name) for name in SPEECH) and role not in MAY_BE_EMPTY:
        if content is None:
            raise Unusable("messages has a content that is not text")
        if not content.strip():
            raise Unusable("messages has an empty content")
    if content is None:
        extra["content"] = None
    return Turn(role, content or "", extra or None, _is_learned(message))


def _is_message(message: Mapping[str, Any]) -> bool:
    return "role" in message and ("content" in message or any(map(message.get, SPEECH)))


def _role(given: Any) -> str:
    name = given.strip().lower() if isinstance(given, str) else ""
    role = ALIASES.get(name, name)
    if role not in ROLES:
        raise Unusable(f"messages has a role other than {', '.join(ROLES)}")
    return role


def _text(content: Any) -> str | None:
    """Return a content's text; parts of text are one text, as in templates that take parts."""
    match content:
        case None | str():
            return content
        case list():
            return "".join(map(_part, content))
        case int() | float() if not isinstance(content, bool):
            return str(content)
    raise Unusable("messages has a content that is not text")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "of no type") if isinstance(part, Mapping) else "of no type"
    raise Unusable(f"messages has a content part that is not text ({kind})")


def _is_learned(message: Mapping[str, Any]) -> bool:
    given = {name: message[name] for name in LEARNS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise Unusable(f"messages has a {name} other than 0 and 1 (false and true)")
    return all(given.values())


def _tools(given: Any) -> list[Any] | None:
    tools = _parsed(given)
    if tools is not None and not isinstance(tools, list):
        raise Unusable("tools is not a list")
    return [_parsed(tool) for tool in tools] if tools else None


def _parsed(value: Any) -> Any:
    """Return what JSON text holds, as Arrow files keep what differs from row to row."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def with_objects(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose tool calls' arguments are objects, not JSON text of them."""
    return [_with_objects(dict(message)) for message in messages]


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with_objects(call) for call in calls]}


def _call_with_objects(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with_objects(call["function"])}
    return {**call, "arguments": _parsed(call["arguments"])} if "arguments" in call else call


def argument_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the arguments of tool calls that are given as text."""
    calls = [call for one in messages for call in one.get("tool_calls") or []]
    functions = [call.get("function") or call for call in calls if isinstance(call, Mapping)]
    arguments = [one.get("arguments") for one in functions if isinstance(one, Mapping)]
    return [text for text in arguments if isinstance(text, str)]


def with_empty_contents(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages without null contents."""
    return [
        {**one, "content": "" if one["content"] is None else one["content"]} for one in messages
    ]


def with_system_role(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose developer turns are system turns, their older name."""
    return [{**one, "role": one["role"].replace("developer", "system")} for one in messages]


def with_joined_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the system turn, unless it is blank, joined to the user's."""
    system, user, *others = [dict(one) for one in messages]
    texts = [one["content"].strip() and one["content"] for one in (system, user)]
    return [{**user, "content": "\n\n".join(filter(None, texts))}, *others]


def begins_with_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the first two turns are a system's and a user's."""
    return [one["role"] for one in messages[:2]] in (["system", "user"], ["developer", "user"])


def with_reasoning(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name each turn's reasoning as templates read it, as transformers does from 5.23 on.

    Most read `reasoning_content`, that of gpt-oss reads `thinking`.
    """
    named: list[dict[str, Any]] = []
    for turn in messages:
        reasoning = next((turn[name] for name in REASONING if turn.get(name) is not None), None)
        if reasoning is not None:
            turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
        named.append(turn)
    return named
