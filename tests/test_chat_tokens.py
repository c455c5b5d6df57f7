"""Conversations by families' chat templates: tokens, what is learned, and what is said of a row."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AddedToken, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from finetune.data.chat_messages import render_chat
from finetune.data.chat_tokens import (
    JOINED,
    REWRITES,
    ask_chat,
    encode_chat,
    find_chat_problems,
    find_learned,
)
from finetune.data.turns import SURROGATE, Encoded, Unusable
from finetune.models.chat_templates import fix_date

FOLDER = Path(trl.__file__).parent / "chat_templates"
# With a training variant in TRL, and those below without one.
TRAINING = [
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "glm4moe",
    "gptoss", "lfm2", "llama3", "nemotron_3_nano", "phi3", "phi3_5", "qwen2_5", "qwen3",
    "qwen3_5_nothink", "qwen3_instruct_2507",
]  # fmt: skip
OTHERS = ["llama3_1", "llama3_2", "lfm2_2_5"]
SPECIAL = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|</?think>|<(?:start|end)_of_turn>|</?tool_call>")
TOOL = {
    "type": "function",
    "function": {
        "name": "lift", "description": "Lift it.",
        "parameters": {
            "type": "object",
            "properties": {"metres": {"type": "integer", "description": "How high."}},
            "required": ["metres"],
        },
    },
}  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def calling(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "lift", "arguments": arguments}}
    return [
        user("Lift it."), assistant(None, tool_calls=[call]),
        {"role": "tool", "tool_call_id": "c1", "content": "done"}, assistant("It is up."),
    ]  # fmt: skip


TWICE = [user("What is it?"), assistant("Paris."), user("And now?"), assistant("London.")]
SYSTEM = {"role": "system", "content": "Be brief."}


def with_template(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Give the tiny tokenizer a family's chat template, and the special tokens that it writes."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    named = sorted(set(SPECIAL.findall(text)))
    tokenizer.add_tokens([AddedToken(token, special="|" in token) for token in named])
    tokenizer.chat_template = text
    return tokenizer


def encode(messages: list[Any], tokenizer: PreTrainedTokenizerBase, **row: Any) -> Encoded:
    return encode_chat(render_chat({"messages": messages, **row}), tokenizer)


def learned(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, **settings: bool) -> str:
    kept = find_learned(encoded, tokenizer, **{"prompt": False, "empty_think": True, **settings})
    return str(tokenizer.decode([t for t, own in zip(encoded.tokens, kept, strict=True) if own]))


def in_force(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return fix_date(get_training_chat_template(tokenizer) or tokenizer.get_chat_template())
    except ValueError:
        return fix_date(tokenizer.get_chat_template())


@pytest.mark.parametrize("name", [*TRAINING, *OTHERS])
def test_tokens_are_those_of_the_template_in_force(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """And the mask is TRL's where it ships a training variant; each answer's end is learned."""
    with_template(tokenizer, name)
    template = in_force(tokenizer)
    expected: Any = tokenizer.apply_chat_template(
        TWICE, chat_template=template, return_dict=True,
        return_assistant_tokens_mask=name in TRAINING,
    )  # fmt: skip
    encoded = encode(TWICE, tokenizer)
    assert encoded.tokens == expected["input_ids"]
    if name in TRAINING:
        assert encoded.is_response == [bool(mark) for mark in expected["assistant_masks"]]
        assert "replaced by its training variant in TRL" in encoded.notes[0]
    said = learned(encoded, tokenizer)
    assert "Paris." in said
    assert "London." in said
    assert "What is it?" not in said
    pairs = zip(encoded.tokens, encoded.is_response, strict=True)
    text = [(t, own) for t, own in pairs if str(tokenizer.decode([t])).strip()]
    ends = [a for (a, own), (_, next_) in pairwise([*text, (0, False)]) if own and not next_]
    specials = set(tokenizer.get_added_vocab().values())
    assert len(ends) == 2
    assert set(ends) <= specials


@pytest.mark.parametrize(
    "name",
    [
        "qwen3", "qwen2_5", "qwen3_instruct_2507", "qwen3_5_nothink", "gptoss", "glm4moe",
        "nemotron_3_nano", "llama3_1", "llama3_2", "lfm2_2_5",
    ],
)  # fmt: skip
def test_tools_and_calls_are_used_as_the_stock_template_uses_them(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Arguments that are JSON text are not quoted once more; what is not used is named."""
    with_template(tokenizer, name)
    messages = calling({"metres": 2})
    settings: dict[str, Any] = {
        "tools": [TOOL], "chat_template": in_force(tokenizer), "return_dict": True,
        "return_assistant_tokens_mask": name in TRAINING,
    }  # fmt: skip
    try:
        expected: Any = tokenizer.apply_chat_template(messages, **settings)
    except TypeError:  # of transformers below 5.23, where a turn has calls and no content
        empty = [{**turn, "content": turn["content"] or ""} for turn in messages]
        expected = tokenizer.apply_chat_template(empty, **settings)
    for arguments in ({"metres": 2}, '{"metres": 2}'):
        encoded = encode(calling(arguments), tokenizer, tools=[TOOL])
        assert encoded.tokens == expected["input_ids"]
        if name in TRAINING:
            kept = find_learned(encoded, tokenizer, prompt=False, empty_think=True)
            assert kept == [bool(mark) for mark in expected["assistant_masks"]]
        assert re.search(r"metres(=|\W+|</arg_key>\W+arg_value>)2", learned(encoded, tokenizer))
    assert "the chat template does not use tool_calls" not in encoded.notes


def test_what_a_template_does_not_use_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    """Also tools; an answer of which nothing is shown is not learned."""
    encoded = encode(calling({"metres": 2}), tokenizer, tools=[TOOL])
    unused = ["tool_calls", "tool_call_id", "tools"]
    assert encoded.notes == tuple(f"the chat template does not use {name}" for name in unused)
    assert learned(encoded, tokenizer) == "It is up.</s>\n"
    assert learned(encoded, tokenizer, prompt=True).count("</s>") == 3  # of 4 turns
    for name in ("reasoning_content", "thinking", "name", "verdict"):
        encoded = encode([user("Hi"), assistant("Yes.", **{name: "As I thought"})], tokenizer)
        assert encoded.notes == (f"the chat template does not use {name}",)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_learned_where_the_template_writes_it(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """In every turn of Qwen3, whose stock template drops the earlier ones."""
    with_template(tokenizer, "qwen3")
    thoughts = {name: "I think."}
    encoded = encode(
        [user("2?"), assistant("2", **thoughts), user("3?"), assistant("3", **thoughts)], tokenizer
    )
    assert learned(encoded, tokenizer).count("<think>\nI think.\n</think>\n\n") == 2
    assert not any("does not use" in note for note in encoded.notes)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}])
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", None])
def test_an_answer_without_weight_carries_no_label(
    tokenizer: PreTrainedTokenizerBase, name: str | None, mark: dict[str, Any]
) -> None:
    """Neither with the prompt masked nor without."""
    if name is not None:
        with_template(tokenizer, name)
    messages = [TWICE[0], {**TWICE[1], **mark}, *TWICE[2:]]
    encoded = encode(messages, tokenizer)
    for prompt in (False, True):
        said = learned(encoded, tokenizer, prompt=prompt)
        assert "Paris." not in said
        assert "London." in said


@pytest.mark.parametrize("answer", ["\n\nYes.", "\nYes.", "  Yes.  ", "Yes.\n"])
def test_an_answer_may_begin_with_white_space(
    tokenizer: PreTrainedTokenizerBase, answer: str
) -> None:
    """Of a template without marks; a token across the border is learned."""
    encoded = encode([user("Hi"), assistant(answer), *TWICE], tokenizer)
    assert "Yes." in learned(encoded, tokenizer)


def test_a_token_across_the_border_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in SmolLM2, where the prompt's newline and the answer's are one token."""
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    encoded = encode([user("Hi"), assistant("\nYes."), *TWICE], tokenizer)
    assert learned(encoded, tokenizer) == "\n\nYes.</s>\nParis.</s>\nLondon.</s>\n"


def test_a_conversation_may_begin_with_the_assistant(tokenizer: PreTrainedTokenizerBase) -> None:
    """Its greeting is learned too; nothing is asked where it says nothing else."""
    encoded = encode([assistant("Hello."), *TWICE], tokenizer)
    assert learned(encoded, tokenizer) == "Hello.</s>\nParis.</s>\nLondon.</s>\n"
    alone = render_chat({"messages": [assistant("Hello.")]})
    assert learned(encode_chat(alone, tokenizer), tokenizer) == "Hello.</s>\n"
    with pytest.raises(Unusable, match="no turn before its only assistant turn"):
        ask_chat(alone, tokenizer)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_turn_that_is_refused_joins_the_users(
    tokenizer: PreTrainedTokenizerBase, role: str
) -> None:
    """Gemma's; the same holds for a template that leaves it out, and for what is asked."""
    gemma = with_template(tokenizer, "gemma")
    messages = [{**SYSTEM, "role": role}, *TWICE]
    joined = [user("Be brief.\n\nWhat is it?"), *TWICE[1:]]
    encoded = encode(messages, gemma)
    assert encoded.tokens == encode(joined, gemma).tokens
    assert JOINED in encoded.notes
    asked = ask_chat(render_chat({"messages": messages}), gemma)
    assert encoded.tokens[: len(asked.tokens)] == asked.tokens
    empty = encode([{**SYSTEM, "content": ""}, *TWICE], gemma)
    assert empty.tokens == encode(TWICE, gemma).tokens
    assert JOINED not in empty.notes
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<s>{{ m.content }}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    assert JOINED in encode(messages, tokenizer).notes


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_system_turn_is_no_fault(
    tokenizer: PreTrainedTokenizerBase, content: str | None
) -> None:
    """The template writes it as it does."""
    encoded = encode([{"role": "system", "content": content}, *TWICE], tokenizer)
    assert str(tokenizer.decode(encoded.tokens)).startswith("<s>system\n</s>\n<s>user\n")


@pytest.mark.parametrize("role", ["developer", "tool", "ipython", "function"])
def test_turns_that_a_template_leaves_out_are_named(
    tokenizer: PreTrainedTokenizerBase, role: str
) -> None:
    """Phi-3 writes users, assistants and the system; a developer's turn is the system's."""
    with_template(tokenizer, "phi3")
    turn = {"role": role, "content": "It is so."}
    encoded = encode([turn, *TWICE] if role == "developer" else [*TWICE, turn], tokenizer)
    named = f"the chat template does not use the text of {role} turns" in encoded.notes
    assert named == (role != "developer")
    assert ("It is so." in str(tokenizer.decode(encoded.tokens))) == (role == "developer")


def test_text_beside_a_call_that_a_template_leaves_out_is_named(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Llama's writes the call alone, Qwen's both."""
    messages = calling({"metres": 2})
    messages[1]["content"] = "I lift it now."
    for name, is_named in (("llama3_1", True), ("qwen3", False)):
        encoded = encode(messages, with_template(tokenizer, name), tools=[TOOL])
        assert ("the chat template does not use the text of assistant turns" in encoded.notes) == (
            is_named
        )


@pytest.mark.parametrize(
    "role", [("user", "assistant"), ("User", "Assistant"), ("human", "gpt"), ("USER", "model")]
)
def test_roles_have_their_other_names(
    tokenizer: PreTrainedTokenizerBase, role: tuple[str, str]
) -> None:
    """ShareGPT's, and any case."""
    messages = [{"role": role[n % 2], "content": m["content"]} for n, m in enumerate(TWICE)]
    assert encode(messages, tokenizer).tokens == encode(TWICE, tokenizer).tokens


def test_parts_of_text_are_one_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """As OpenAI's messages have them."""
    parts = [
        {**m, "content": [{"type": "text", "text": m["content"][:3]}, m["content"][3:]]}
        for m in TWICE
    ]
    assert encode(parts, tokenizer).tokens == encode(TWICE, tokenizer).tokens


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_nothink", "glm4moe"])
def test_a_think_block_without_a_thought_can_be_masked(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """By data.mask_empty_think; a thought is learned either way."""
    with_template(tokenizer, name)
    encoded = encode(TWICE, tokenizer)
    assert "</think>" in learned(encoded, tokenizer)
    said = learned(encoded, tokenizer, empty_think=False)
    assert "think>" not in said
    assert "Paris." in said
    if name == "qwen3":
        thoughtful = encode([user("2?"), assistant("2", reasoning_content="Two.")], tokenizer)
        assert "<think>\nTwo." in learned(thoughtful, tokenizer, empty_think=False)


def test_a_variant_of_a_known_template_leaves_out_only_what_it_rewrites(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """TRL looks texts up as they are; a comment makes Qwen3's another one."""
    with_template(tokenizer, "qwen3")
    tokenizer.chat_template = "{#- mine -#}" + str(tokenizer.chat_template)
    assert find_chat_problems(tokenizer) == []
    assert "Paris." in learned(encode(TWICE[:2], tokenizer), tokenizer)
    with pytest.raises(Unusable, match=REWRITES):
        encode(TWICE, tokenizer)
    with_template(tokenizer, "phi3")  # ends a conversation in the end of the sequence
    tokenizer.chat_template = "{#- mine -#}" + str(tokenizer.chat_template)
    assert learned(encode(TWICE, tokenizer), tokenizer).startswith("Paris.<|end|>\nLondon.<|end|>")


def test_every_fault_is_the_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    """Half a character, a template that fails, and one that shows nothing to learn."""
    with pytest.raises(Unusable, match=re.escape(SURROGATE)):
        encode([user("Hi \ud800"), assistant("Yes.")], tokenizer)
    tokenizer.chat_template = "{{ messages[0].content | tojson(1, 2, 3, 4, 5, 6) }}"
    with pytest.raises(Unusable, match=r"the chat template fails: .*argument"):
        encode(TWICE, tokenizer)
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    )
    with pytest.raises(Unusable, match="the chat template marks no response"):
        encode(TWICE, tokenizer)


def test_a_border_inside_a_token_is_no_rewriting(tokenizer: PreTrainedTokenizerBase) -> None:
    """Mistral-Instruct-v0.1 ends an answer in a space, which is one token with what follows."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        " [/INST]{% elif m.role == 'assistant' %}{{ m.content + eos_token + ' ' }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer.add_tokens([AddedToken(" [INST]", normalized=False)])
    encoded = encode(TWICE, tokenizer)
    assert learned(encoded, tokenizer) == "Paris.</s>London.</s> "
    assert JOINED in encode([SYSTEM, *TWICE], tokenizer).notes


def test_a_tokenizer_may_have_a_second_template_for_tools(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """As Hermes and Command-R have; it is taken where the row has tools."""
    plain = str(tokenizer.chat_template)
    tools = "{% for t in tools %}<s>tool\n{{ t | tojson }}</s>{% endfor %}"
    tokenizer.chat_template = {"default": plain, "tool_use": tools + plain}
    encoded = encode(TWICE, tokenizer, tools=[TOOL])
    assert '"lift"' in str(tokenizer.decode(encoded.tokens))
    assert '"lift"' not in learned(encoded, tokenizer)
    assert "the chat template does not use tools" not in encoded.notes
    assert encode(TWICE, tokenizer).notes == ()
    assert find_chat_problems(tokenizer) == []
