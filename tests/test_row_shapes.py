"""Shapes of rows: each is recognised or set, and the templates' fields come out of it."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from finetune.data.row_shapes import Reading, find_reading, find_unknown_fields
from finetune.data.templates import load_template
from finetune.data.turns import Unusable

TALK = [{"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Say."}]
LONGER = [
    {"role": "system", "content": "Be brief."}, *TALK,
    {"role": "user", "content": "More?"}, {"role": "assistant", "content": "No."},
]  # fmt: skip
SHAREGPT = [{"from": "human", "value": "Ask."}, {"from": "gpt", "value": "Say."}]
ONE = {"instruction": "Ask.", "output": "Say."}
# Rows that all say the same, with the shape that is told.
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "alpaca": ("Alpaca", ONE),
    "dolly": ("Dolly", {"instruction": "Ask.", "context": "", "response": "Say."}),
    "prompt": ("prompt and completion", {"prompt": "Ask.", "completion": "Say."}),
    "response": ("prompt and completion", {"prompt": "Ask.", "response": "Say."}),
    "messages": ("prompt and completion", {"prompt": TALK[:1], "completion": TALK[1:]}),
    "question": ("question and answer", {"question": "Ask.", "answer": "Say."}),
    "output": ("prompt and completion", {"input": "Ask.", "output": "Say."}),
    "targets": ("prompt and completion", {"inputs": "Ask.", "targets": "Say."}),
    "sharegpt": ("ShareGPT", {"conversations": SHAREGPT}),
    "openai": ("OpenAI messages", {"conversations": TALK}),
    "text": ("OpenAI messages as JSON text", {"messages": json.dumps(TALK)}),
    "sharegpt_text": ("ShareGPT as JSON text", {"conversations": json.dumps(SHAREGPT)}),
    "sequence": (
        "ShareGPT",
        {"conversations": {"from": ["human", "gpt"], "value": ["Ask.", "Say."]}},
    ),
    "lists": ("list of lists", {"messages": [["Ask.", "Say."]]}),
    "turns": ("list of turns", {"messages": ["Ask.", "Say."]}),
    "pairs": ("question and answer pairs", {"conversation": [{"input": "Ask.", "output": "Say."}]}),
}


def reading_of(row: dict[str, Any], template: str, given: str | None = None, **c: str) -> Reading:
    columns = {"instruction": "instruction", "input": "input", "output": "output", **c}
    return find_reading([row], load_template(template), columns, given)


@pytest.mark.parametrize("name", SHORT)
def test_a_shape_is_recognised_and_named(name: str) -> None:
    """The same question and answer come out for both kinds of templates."""
    shape, row = SHORT[name]
    chat, plain = reading_of(row, "chat"), reading_of(row, "alpaca")
    assert chat.shape == shape
    assert chat.fields(row)["messages"] == TALK
    fields = plain.fields(row)
    assert (fields["instruction"], fields["output"]) == ("Ask.", "Say.")
    assert not any(fields[name] for name in ("input", "system", "history"))
    assert chat.unused == plain.unused == ()


FULL: dict[str, dict[str, Any]] = {
    "alpaca": {
        "instruction": "More?", "output": "No.", "system": "Be brief.",
        "history": [["Ask.", "Say."]],
    },
    "history_text": {
        "instruction": "More?", "output": "No.", "system": "Be brief.",
        "history": '[["Ask.", "Say."]]',
    },
    "openai": {"messages": LONGER},
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [
            *SHAREGPT, {"from": "human", "value": "More?"}, {"from": "gpt", "value": "No."},
        ],
    },
    "lists": {"system": "Be brief.", "conversation": [["Ask.", "Say."], ["More?", "No."]]},
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_the_system_prompt_and_earlier_turns_are_kept(name: str) -> None:
    """In a chat as turns, in Alpaca's prompt before the instruction, as LLaMA-Factory has it."""
    assert reading_of(FULL[name], "chat").fields(FULL[name])["messages"] == LONGER
    fields = reading_of(FULL[name], "alpaca").fields(FULL[name])
    asked, answer = load_template("alpaca").render(fields)
    assert asked.content == (
        "Be brief.\n\n### Instruction:\nAsk.\n\n### Response:\nSay.\n\n"
        "### Instruction:\nMore?\n\n### Response:\n"
    )
    assert answer.content == "No."


def test_the_context_of_a_question_is_its_input() -> None:
    """Dolly's, also where the answer's column was set by hand."""
    row = {"instruction": "Who?", "context": "By Ann.", "response": "Ann.", "category": "qa"}
    for reading in (reading_of(row, "alpaca"), reading_of(row, "alpaca", output="response")):
        assert reading.fields(row)["input"] == "By Ann."
        assert reading.unused == ("category",)
    (asked, _) = reading_of(row, "chat").fields(row)["messages"]
    assert asked["content"] == "Who?\nBy Ann."


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (3, "3"), (2.5, "2.5"), (Decimal("1.50"), "1.50"), (True, True), (None, None), ("x", "x"),
    ],
)  # fmt: skip
def test_a_number_to_learn_is_text(output: Any, text: Any) -> None:
    """As the same number is in a csv file; a truth value or nothing is not made up into text."""
    row = {"instruction": "Add.", "output": output}
    assert reading_of(row, "alpaca").fields(row)["output"] == text
    assert reading_of(row, "alpaca").fields({**row, "input": 4})["input"] == "4"
    fields = reading_of({"q": 1, "r": output}, "chat", instruction="q", output="r")
    assert fields.shape == "Alpaca"


def test_what_a_message_holds_stays_in_it() -> None:
    """Weights, calls and tools go on to the chat template, from ShareGPT too."""
    call = json.dumps({"name": "lift", "arguments": {"metres": 1}})
    row = {
        "tools": "[]",
        "conversations": [
            {"from": "human", "value": "Lift.", "weight": 0},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "done"},
            {"from": "gpt", "value": "It is up.", "reasoning_content": "I looked."},
        ],
    }
    reading = reading_of(row, "chat")
    fields = reading.fields(row)
    asked, called, result, answer = fields["messages"]
    assert asked["weight"] == 0
    assert called["tool_calls"][0]["function"]["name"] == "lift"
    assert (result["role"], answer["reasoning_content"]) == ("tool", "I looked.")
    assert fields["tools"] == []
    assert reading.unused == ()


@pytest.mark.parametrize("roles", [("User ", "ASSISTANT"), ("human", "gpt"), ("user", "model")])
def test_a_plain_prompt_knows_the_other_names_of_roles(roles: tuple[str, str]) -> None:
    """Those that a chat template's messages may have."""
    row = {"messages": [{**turn, "role": role} for turn, role in zip(TALK, roles, strict=True)]}
    fields = reading_of(row, "alpaca").fields(row)
    assert (fields["instruction"], fields["output"]) == ("Ask.", "Say.")


@pytest.mark.parametrize("content", [7, 2.5])
def test_a_number_in_a_message_is_text(content: Any) -> None:
    """In a plain prompt as in a conversation."""
    row = {"messages": [TALK[0], {**TALK[1], "content": content}]}
    assert reading_of(row, "alpaca").fields(row)["output"] == str(content)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([*TALK[:1], {"role": "tool", "content": "x"}, TALK[1]], "role tool.*chat"),
        ([TALK[0], {**TALK[1], "reasoning_content": "hm"}], "reasoning_content.*chat"),
        ([TALK[0], {**TALK[1], "weight": 0}], "weight.*chat"),
        ([*TALK, TALK[0]], "alternate"),
        ([TALK[1]], "alternate"),
    ],
)
def test_a_plain_prompt_refuses_what_it_would_lose(messages: list[Any], reason: str) -> None:
    """The row is counted with its reason, and the template that takes it."""
    row = {"messages": messages}
    with pytest.raises(Unusable, match=reason):
        reading_of(row, "alpaca").fields(row)


OTHER_SHAPES: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"messages": TALK}, "another shape .*: OpenAI messages"),
    ("alpaca", {"conversations": SHAREGPT}, "another shape .*: ShareGPT"),
    ("alpaca", {"question": "Ask.", "answer": "Say."}, "another shape .*: question and answer"),
    ("alpaca", {"instruction": "Ask.", "response": "Say."}, "another shape .*: Dolly"),
    ("alpaca", {"text": "Say."}, "it has no column instruction, output"),
    ("openai", ONE, "another shape .*: Alpaca"),
    ("openai", {"text": "Say."}, "it has no column conversations"),
]


@pytest.mark.parametrize(("shape", "row", "reason"), OTHER_SHAPES)
@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_a_row_of_another_shape_is_left_out_by_its_name(
    template: str, shape: str, row: dict[str, Any], reason: str
) -> None:
    """The first rows decide on the shape; a later one is counted under what it is."""
    reading = reading_of(SHORT[shape][1], template)
    with pytest.raises(Unusable, match=reason):
        reading.fields(row)


@pytest.mark.parametrize(
    ("first", "row", "field", "text"),
    [
        (ONE, {**ONE, "input": "By Ann."}, "input", "By Ann."),
        (ONE, {**ONE, "context": "By Ann."}, "input", "By Ann."),
        (ONE, {**ONE, "system_prompt": "Be brief."}, "system", "Be brief."),
        (ONE, {**ONE, "history": [["Ask.", "Say."]]}, "history", "Say."),
        (
            {"conversations": SHAREGPT}, {"conversations": SHAREGPT, "system": "Be brief."},
            "system", "Be brief.",
        ),
    ],
)  # fmt: skip
def test_a_later_row_may_say_more_than_the_first_ones(
    first: dict[str, Any], row: dict[str, Any], field: str, text: str
) -> None:
    """A column that the first rows lack is used all the same, and not named as unused."""
    plain, chat = reading_of(first, "alpaca"), reading_of(first, "chat")
    assert text in str(plain.fields(row)[field])
    assert text in str(chat.fields(row)["messages"])
    assert plain.with_names(row).unused == chat.with_names(row).unused == ()


def test_columns_of_later_rows_are_counted_too() -> None:
    """As not used, and no longer as lacking."""
    reading = reading_of(ONE, "alpaca", input="background")
    assert (reading.unused, reading.absent) == ((), ("background",))
    later = reading.with_names({**ONE, "background": "By Ann.", "id": 1})
    assert (later.unused, later.absent) == (("id",), ())


@pytest.mark.parametrize("answer", [["a", "b"], [1], {"text": "a"}])
def test_an_answer_that_is_a_list_is_no_text(answer: Any) -> None:
    """The reason is the output's, not one of conversations."""
    row = {"question": "Ask.", "answer": answer}
    fields = reading_of(row, "alpaca").fields(row)
    with pytest.raises(Unusable, match="output is not text"):
        load_template("alpaca").render(fields)
    with pytest.raises(Unusable, match="output is not text"):
        reading_of(row, "chat").fields(row)


def test_a_field_that_nothing_reads_is_found() -> None:
    """A slip of the pen in data.columns; fields of shapes and of a file's template are known."""
    columns = {"instruction": "q", "conversations": "c", "context": "d", "outptu": "x"}
    for name in ("alpaca", "chat", "text"):
        assert find_unknown_fields(load_template(name), columns) == ["outptu"]


def test_columns_that_nobody_uses_or_has_are_named() -> None:
    """Of the data, and of the settings."""
    row = {"id": 1, "": 0, "instruction": "Ask.", "output": "Say."}
    reading = reading_of(row, "alpaca", input="background")
    assert reading.unused == ("id", "(without a name)")
    assert reading.absent == ("background",)


@pytest.mark.parametrize(
    ("given", "row", "is_taken"),
    [
        ("sharegpt", {"conversations": SHAREGPT, **ONE}, True),
        ("openai", {"messages": TALK}, True),
        ("lists", {"messages": [["Ask.", "Say."]]}, True),
        ("alpaca", {"messages": SHAREGPT, **ONE}, True),
        ("dolly", ONE, False),
        ("sharegpt", {"messages": TALK}, False),
        ("text", ONE, False),
    ],
)
@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_shape_can_be_set(
    given: str, row: dict[str, Any], is_taken: bool, template: str
) -> None:
    """Rows of another one are refused, with what they have."""
    if is_taken:
        assert reading_of(row, template, given).fields(row)
        return
    with pytest.raises(ValueError, match=f"data.format is {given}.*columns"):
        reading_of(row, template, given)


def test_a_file_template_takes_its_own_columns_first(tmp_path: Any) -> None:
    """What it lacks comes from the shape: the answer of a question."""
    path = tmp_path / "a.jinja"
    path.write_text("{{ question }}\n", encoding="utf-8")
    row = {"question": "Ask.", "answer": "Say."}
    reading = reading_of(row, str(path))
    assert reading.fields(row) == {"question": "Ask.", "output": "Say."}
