"""The training's prompt as Ollama's TEMPLATE and SYSTEM, which are Go templates.

Texts around the messages are found by rendering the prompt with marks in their places.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from finetune.data.chat_tokens import Chat
from finetune.data.templates import ALPACA_EARLIER, ALPACA_PARTS, load_template
from finetune.data.turns import Turn, Unusable
from finetune.models.chat_templates import ChatTemplates

# Stand for what a conversation says: letters that a template's filters leave as they are.
SYSTEM, USER, ANSWER, LATER = (f"mark-{name}-mark" for name in ("one", "two", "three", "four"))
MARKS = {"system": SYSTEM, "user": USER, "assistant": ANSWER}


@dataclass(frozen=True)
class OllamaPrompt:
    """What a Modelfile says of prompts; without a template the base's one is used."""

    template: str | None
    system: str | None = None  # unless the user sets another one
    stop: str | None = None  # ends an answer
    note: str | None = None  # what is not carried over


class _NotExpressible(Exception):
    """A chat template is not a prefix and a suffix around each message."""


def build_prompt(name: str, tokenizer: PreTrainedTokenizerBase) -> OllamaPrompt:
    """Return the prompt of `data.prompt_template` in Ollama's form."""
    template = load_template(name)
    if template.has_turns:
        try:
            return _build_chat(tokenizer)
        except (_NotExpressible, Unusable):
            note = "the chat template cannot be written as Ollama's TEMPLATE; the base's is used"
            return OllamaPrompt(None, note=note)
    if name == "alpaca":
        return _build_alpaca()
    fields = [field for field in template.required if field != "output"]
    if name == "text" or len(fields) != 1:
        note = f"write the rendered prompt of {', '.join(fields)} (prompt.jinja)"
        return OllamaPrompt("{{ .Prompt }}{{ .Response }}", note=None if name == "text" else note)
    prompt = template.render({fields[0]: USER, "output": "-"})[0].content
    if prompt.count(USER) != 1:
        note = f"write the rendered prompt of {fields[0]} (prompt.jinja)"
        return OllamaPrompt("{{ .Prompt }}{{ .Response }}", note=note)
    before, after = map(escape, prompt.split(USER))
    return OllamaPrompt(f"{before}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}")


def escape(text: str) -> str:
    """Return text as a Go template renders it unchanged."""
    return text.replace("{{", '{{ "{{" }}')


def _build_alpaca() -> OllamaPrompt:
    """Return Alpaca's prompt; its first sentence is the system message, as in training."""
    preface, _ = ALPACA_PARTS[False]
    turn = ALPACA_EARLIER.format("{{ .Prompt }}", "{{ .Response }}")
    system = "{{ if .System }}{{ .System }}\n\n{{ end }}"
    return OllamaPrompt(system + turn, system=preface)


@dataclass(frozen=True)
class _Turns:
    """The texts around the messages of a chat template."""

    first: str  # before the first user message, where there is no system message
    later: str  # before another one
    before_answer: str
    after_answer: str
    end: str  # of an answer, without the BOS that may follow it


def _build_chat(tokenizer: PreTrainedTokenizerBase) -> OllamaPrompt:
    template = ChatTemplates(tokenizer).find()

    def render(*messages: Turn, asks: bool = True) -> str:
        chat = Chat([turn.message for turn in messages], template, tokenizer, None, {})
        return chat.render(asks=asks)

    system, user, answer = (Turn(role, mark) for role, mark in MARKS.items())
    bos = _added_bos(tokenizer)
    turns = _find_turns(
        render(user),
        render(user, answer, asks=False),
        render(user, answer, Turn("user", LATER)),
        bos,
    )
    try:
        with_system = render(system, user)
    except Unusable:  # the template has no system role
        with_system = ""
    prefix, default = _find_prefix(turns, with_system.removeprefix(bos))
    body = "{{ .Prompt }}" + escape(turns.before_answer) + "{{ .Response }}"
    note = f"Ollama begins with {bos}, which the chat template of the training does not write"
    return OllamaPrompt(
        prefix + body + escape(turns.after_answer),
        system=default,
        stop=turns.end if turns.end in tokenizer.get_vocab() else None,
        note=note if bos and not render(user).startswith(bos) else None,
    )


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the BOS that the tokenizer, and so Ollama, puts before any text; else nothing."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return str(tokenizer.bos_token) if first == [tokenizer.bos_token_id] else ""


def _find_turns(asked: str, answered: str, continued: str, bos: str) -> _Turns:
    """Split rendered conversations of one question, with its answer, and with another question.

    A leading BOS is left out, which Ollama adds; one before later questions follows the answers.
    """
    first, before_answer = _split(asked, USER)
    head, after_answer = _split(answered, ANSWER)
    earlier, rest = _split(continued, ANSWER)
    between, tail = _split(rest, LATER)
    # What follows the question beyond `asked` is generated, as a space or an empty thought.
    is_same = head.startswith(asked) and earlier in (asked, head)
    if not is_same or tail != before_answer:
        raise _NotExpressible
    if not between.startswith(after_answer):  # a template that ends a conversation in its own way
        after_answer = between.removesuffix(first)
    later = between.removeprefix(after_answer)
    end = after_answer.strip()
    if bos and first.startswith(bos):
        first = first.removeprefix(bos)
        if later.startswith(bos):
            later, after_answer = later.removeprefix(bos), after_answer + bos
    return _Turns(first, later, before_answer, after_answer, end)


def _find_prefix(turns: _Turns, with_system: str) -> tuple[str, str | None]:
    """Return the template's text before a user message, and the default system message."""
    if SYSTEM not in with_system:
        if turns.first != turns.later:
            raise _NotExpressible
        return escape(turns.later), None
    before, rest = _split(with_system, SYSTEM)
    after, tail = _split(rest, USER)
    if tail != turns.before_answer:
        raise _NotExpressible
    default = None
    if turns.first != turns.later:
        is_framed = turns.first.startswith(before) and turns.first.endswith(after)
        if not is_framed or len(turns.first) <= len(before) + len(after):
            raise _NotExpressible  # an empty message, for one, is none to Ollama
        default = turns.first[len(before) : len(turns.first) - len(after)]
    framed = f"{escape(before)}{{{{ .System }}}}{escape(after)}"
    return f"{{{{ if .System }}}}{framed}{{{{ else }}}}{escape(turns.later)}{{{{ end }}}}", default


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise _NotExpressible
    before, _, after = text.partition(mark)
    return before, after
