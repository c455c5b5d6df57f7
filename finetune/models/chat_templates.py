"""The chat template in force: the tokenizer's or `model.chat_template`, with a fixed date.

TRL ships training variants of known templates, which keep earlier turns as they were and mark what
the assistant says (`{% generation %}`); where the text is one of those, its variant is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from finetune.config.paths import local_path

# What Llama's templates print where there is no clock: a prompt is the same on every day.
DATE = date(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")
ANY_FORMAT = "{%- macro strftime_now(format) -%}" + f"{DATE:%d %b %Y}" + "{%- endmacro -%}"
# What a template raises, beside jinja's own, where a message is not what it expects.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text as it is applied, and how that differs from the tokenizer's."""

    text: str
    is_training_variant: bool = False
    has_date: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the row counts: a training variant, a fixed date."""
        variant = ("the chat template is replaced by its training variant in TRL",)
        dated = (f"the chat template prints the date, fixed at {DATE:%d %b %Y}",)
        return (*variant * self.is_training_variant, *dated * self.has_date)

    @property
    def marks_responses(self) -> bool:
        return bool(has_generation_markers(self.text))


def read_chat_template(name: str) -> str:
    """Return the text of `model.chat_template`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a jinja2 template.
    """
    path = local_path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"model.chat_template={name}: there is no file {path.absolute()}; give the path of a "
            "jinja2 file that writes `messages`, or null for the tokenizer's chat template"
        )
    try:
        text = path.read_text(encoding="utf-8")
        render_jinja_template([[]], chat_template=text)
    except UnicodeDecodeError:
        raise ValueError(
            f"model.chat_template={name}: the file is not UTF-8; save it as UTF-8"
        ) from None
    except TemplateSyntaxError as error:
        raise ValueError(
            f"model.chat_template={name}: line {error.lineno}: {error.message}"
        ) from None
    except TEMPLATE_ERRORS:
        pass  # of a conversation without messages; the rows are tried by their own check
    if "messages" not in text:
        raise ValueError(
            f"model.chat_template={name}: it does not use `messages`; give the path of a jinja2 "
            "file that writes a conversation's `messages`"
        )
    return text


class ChatTemplates:
    """A tokenizer's chat templates in force, each looked up once for all conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._found: dict[str, ChatTemplate] = {}  # by the tokenizer's own text

    def find(self, *, has_tools: bool = False) -> ChatTemplate:
        """Return the template in force, of a tokenizer that has one."""
        text = self.tokenizer.get_chat_template(tools=[] if has_tools else None)
        if text not in self._found:
            self._found[text] = _find_in_force(self.tokenizer, text)
        return self._found[text]


def find_chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the template in force where there are no tools, of a tokenizer that has one."""
    return ChatTemplates(tokenizer).find()


def _find_in_force(tokenizer: PreTrainedTokenizerBase, text: str) -> ChatTemplate:
    variant = _find_training_variant(tokenizer, text)
    fixed = fix_date(variant or text)
    return ChatTemplate(fixed, variant is not None, fixed != (variant or text))


def _find_training_variant(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    if text != tokenizer.get_chat_template():
        return None  # a second template for tools, which TRL does not look up
    try:
        variant: str | None = get_training_chat_template(tokenizer)
    except TEMPLATE_ERRORS:  # ValueError where TRL has none; others of templates it tries in vain
        return None
    return variant


def fix_date(text: str) -> str:
    """Return a template that prints the same date on every day."""
    fixed = CLOCK.sub(lambda call: f'"{DATE.strftime(call[1] or call[2] or "")}"', text)
    return ANY_FORMAT + fixed if "strftime_now(" in fixed else fixed
