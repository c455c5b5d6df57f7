"""Templates: chat by the tokenizer's own, plain text, and a user's file; what of it is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from jinja2 import Environment
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from finetune.config.inputs import DataSource
from finetune.config.schema import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    PeftConfig,
    SourceConfig,
    TrainingConfig,
)
from finetune.data.chat_messages import ROLES
from finetune.data.chat_tokens import REWRITES, find_chat_problems
from finetune.data.dataset import Examples, SourceRows, build_examples, find_problems
from finetune.data.row_prompts import last_prompts
from finetune.data.templates import JINJA, load_template, save_prompt
from finetune.data.token_rows import IGNORED, Example
from finetune.models import base_model
from finetune.models.base_model import find_model, load_base, load_tokenizer
from finetune.pipeline import preflight, run_jobs, samples
from finetune.pipeline.identity import data_identity
from finetune.pipeline.session import Session
from tests.conftest import TINY, Command, train_tiny, write_rows

CHAT_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


def sourced(rows: list[Any], data: DataConfig) -> list[SourceRows]:
    (settings,) = data.sources().values()
    return [(DataSource("data.path", "rows.jsonl", "", settings), rows)]


def build(
    rows: list[Any], tokenizer: PreTrainedTokenizerBase, template: str, **settings: Any
) -> Examples:
    data = DataConfig(path="rows.jsonl", prompt_template=template, **settings)
    return build_examples(sourced(rows, data), data, TrainingConfig(), tokenizer)


def learned(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORED]))


def template_file(folder: Path, text: str) -> str:
    path = folder / "prompt.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_of_a_conversation_the_assistants_turns_are_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The text is the tokenizer's own; each of its turns counts, with the end that it must say."""
    (example,) = build([{"messages": CONVERSATION}], tokenizer, "chat").train
    assert tokenizer.decode(example["input_ids"]) == (
        "<s>system\nBe brief.</s>\n<s>user\nOne?</s>\n<s>assistant\nYes, one.</s>\n"
        "<s>user\nTwo?</s>\n<s>assistant\nNo.</s>\n"
    )
    assert learned(example, tokenizer) == "Yes, one.</s>\nNo.</s>\n"
    (whole,) = build([{"messages": CONVERSATION}], tokenizer, "chat", mask_prompt=False).train
    assert whole["labels"] == [IGNORED, *whole["input_ids"][1:]]


@pytest.mark.parametrize("name", ["llama3", "lfm2", "cohere"])
def test_the_mask_is_that_of_trls_assistant_only_loss(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """TRL patches known templates with marks; ours needs none, and believes marks it meets."""
    tokenizer.chat_template = (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    marked = get_training_chat_template(tokenizer)
    expected: Any = tokenizer.apply_chat_template(
        CONVERSATION, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
    )
    rows = [{"messages": CONVERSATION}]
    for template in (tokenizer.chat_template, marked):
        tokenizer.chat_template = template
        (example,) = build(rows, tokenizer, "chat").train
        assert example["input_ids"] == expected["input_ids"]
        mask = [int(label != IGNORED) for label in example["labels"]]
        assert mask == expected["assistant_masks"]
        assert sum(mask) > 10


def test_a_template_that_rewrites_earlier_turns_leaves_those_rows_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A second turn would be learned in a context that no generation sees; single turns pass."""
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: "
        "{{ m.content if loop.last or m.role != 'assistant' else 'Something.' }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    rows = [{"messages": messages} for messages in (CONVERSATION, CONVERSATION[:3])]
    built = build(rows, tokenizer, "chat")
    assert built.counts.dropped == {REWRITES: 1}
    assert built.counts.drawn == 1
    assert find_chat_problems(tokenizer) == []


def test_a_template_whose_responses_have_no_end_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A model that it trains would not learn to stop."""
    tokenizer.chat_template = (CHAT_TEMPLATES / "glm4moe.jinja").read_text(encoding="utf-8")
    (problem,) = find_chat_problems(tokenizer)
    assert "no special token to learn as its end; set model.chat_template=FILE" in problem


def test_a_tokenizer_without_a_chat_template_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """With the two ways out."""
    tokenizer.chat_template = None
    (problem,) = find_chat_problems(tokenizer)
    assert "the model's tokenizer has no chat template; set model.chat_template=FILE" in problem


def test_malformed_conversations_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each fault has its reason, and the rest is learned."""
    user, assistant = CONVERSATION[1:3]
    faults: dict[str, Any] = {
        "messages is null": None,
        "messages is not a list": "hello",
        "messages has an item without role and content": [user, {"by": "gpt", "value": "x"}],
        f"messages has a role other than {', '.join(ROLES)}": [user, {**user, "role": "bot"}],
        "messages has an empty content": [user, {**assistant, "content": " "}],
        "messages has a content that is not text": [user, {**assistant, "content": None}],
        "messages has no assistant turn": [user],
        "messages has a content part that is not text (image_url)": [
            {**user, "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            assistant,
        ],
        "messages has a weight other than 0 and 1 (false and true)": [
            user,
            {**assistant, "weight": 0.5},
        ],
        "messages has no assistant turn to learn (weight: 0, train: false)": [
            user,
            {**assistant, "train": False},
        ],
    }
    rows = [{"messages": messages} for messages in (*faults.values(), CONVERSATION)]
    built = build(rows, tokenizer, "chat")
    assert built.counts.dropped == dict.fromkeys(faults, 1)
    assert list(built.counts.first.values()) == list(range(1, len(faults) + 1))
    assert built.counts.drawn == 1


def test_a_row_that_the_chat_template_refuses_is_counted(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Such as one of more turns than the template writes."""
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    rows = [{"messages": CONVERSATION[1:]}, {"messages": CONVERSATION[1:3]}]
    built = build(rows, tokenizer, "chat")
    assert built.counts.dropped == {"the chat template refuses it: too long": 1}
    data = DataConfig(path="rows.jsonl", prompt_template="chat")
    assert len(last_prompts(sourced(rows, data), data, TrainingConfig(), tokenizer, 3)) == 1


def test_plain_text_is_learned_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    """But for its first token, which nothing predicts; a column can be named."""
    rows = [{"body": "Once upon a time."}, {"body": ""}]
    built = build(rows, tokenizer, "text", columns={"text": "body"})
    (example,) = built.train
    assert learned(example, tokenizer) == "nce upon a time.</s>"
    assert built.counts.dropped == {"text is empty": 1}


def test_a_users_file_is_the_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Its variables are columns of any kind, the output follows and is alone learned."""
    name = template_file(
        tmp_path,
        "Q: {{ question }}\n{% if hint %}\nHint: {{ hint }}\n{% endif %}\n"
        "{% for choice in choices.text %}\n- {{ choice }}\n{% endfor %}\nA:\n",
    )
    columns = {"output": "answer", "question": "q"}
    choices = {"text": ["ice", "fog"]}
    rows: list[dict[str, Any]] = [
        {"q": "Cold?", "hint": None, "choices": choices, "answer": "ice"},
        {"q": "Cold?", "hint": "H2O", "choices": choices, "answer": "ice"},
        {"q": "Cold?", "hint": "", "choices": "ice", "answer": "ice"},
        {"q": "Cold?", "hint": "", "choices": choices, "answer": ""},
    ]
    built = build(rows, tokenizer, name, columns=columns)
    texts = [tokenizer.decode(example["input_ids"]) for example in built.train]
    assert texts == [
        "Q: Cold?\n- ice\n- fog\nA:\nice</s>",
        "Q: Cold?\nHint: H2O\n- ice\n- fog\nA:\nice</s>",
    ]
    assert learned(built.train[0], tokenizer) == "ice</s>"
    assert built.counts.dropped == {
        "the template fails: 'str object' has no attribute 'text'": 1, "output is empty": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ question", "line 1: unexpected end of template"),
        ("Q: {{ question }} A: {{ output }}", "it holds {{ output }}"),
        ("Say something.", "it names no field"),
    ],
)
def test_a_file_that_is_no_prompt_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Before the start, beside a missing data file."""
    name = template_file(tmp_path, text)
    problems = find_problems(DataConfig(path="none.jsonl", prompt_template=name), None)
    assert len(problems) == 2
    assert f"data.prompt_template={name}: {message}" in problems[0]


def test_a_users_file_runs_no_code(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The sandbox refuses what leads out of the row."""
    name = template_file(tmp_path, "{{ question.__class__.__mro__ }}")
    with pytest.raises(
        ValueError, match=r"no row is left.*the template fails: access to attribute"
    ):
        build([{"question": "x", "output": "y"}], tokenizer, name)


@pytest.mark.parametrize("template", ["alpaca", "chat", "text", "file"])
def test_samples_ask_what_the_rows_ask(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str
) -> None:
    """A prompt is what stands before the last response, in the tokens of training."""
    name = template_file(tmp_path, "{{ instruction }}\n") if template == "file" else template
    rows: list[Any] = [
        {"instruction": f"{i}?", "output": "x", "text": f"{i} a b", "messages": CONVERSATION}
        for i in range(5)
    ]
    data = DataConfig(path="rows.jsonl", prompt_template=name)
    read, training = sourced(rows, data), TrainingConfig()
    prompts = last_prompts(read, data, training, tokenizer, 3)
    examples = build_examples(read, data, training, tokenizer).train[-3:]
    assert len(prompts) == 3
    for prompt, example in zip(prompts, examples, strict=True):
        assert tokenizer.decode(prompt.tokens) == prompt.text
        assert example["input_ids"][: len(prompt.tokens)] == prompt.tokens
    assert prompts[-1].text.endswith(
        {"alpaca": "4?\n\n### Response:\n", "chat": "Two?</s>\n<s>assistant\n", "text": "4 a b",
         "file": "4?\n"}[template]
    )  # fmt: skip


def test_the_base_answers_once_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of one process that ask the same tell the same; each tuned model answers."""
    asked: list[bool] = []
    said = samples.answer

    def answer(model: Any, *given: Any) -> list[str]:
        asked.append(isinstance(model, PeftModel))
        return said(model, *given)

    monkeypatch.setattr(run_jobs, "answer", answer)
    monkeypatch.setattr(samples, "answer", answer)
    session = Session()
    evaluation = EvaluationConfig(["demo_science"], limit=4)
    runs = [
        train_tiny(tmp_path / str(rank), session, lora=LoraConfig(r=rank), evaluation=evaluation)
        for rank in (2, 4)
    ]
    assert asked == [False, True, True]
    one, other = (json.loads((run / "samples.json").read_text()) for run in runs)
    assert [sample["base"] for sample in one] == [sample["base"] for sample in other]
    model = ModelConfig(path="random://tiny")
    base = load_base(model, find_model(model), torch.device("cpu"))
    tokenizer = load_tokenizer(model, find_model(model))
    ids = tokenizer(one[0]["prompt"], add_special_tokens=False)["input_ids"]
    assert samples.answer(base, tokenizer, [ids]) == [one[0]["base"]]


def test_a_base_that_nobody_asks_is_not_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights were trained, nothing is scored: the base is let go of, and that is all."""
    loaded: list[str] = []

    def load(model: ModelConfig, *given: Any) -> Any:
        loaded.append(Path(model.path).name)
        return load_base(model, *given)

    monkeypatch.setattr(base_model, "load_base", load)
    train_tiny(tmp_path, peft=PeftConfig(method="full"))
    assert loaded == ["tiny", "model"]  # the base, and what it became


def test_a_run_is_named_by_the_templates_content_and_the_mixs_shares(tmp_path: Path) -> None:
    """Not by a path, nor by weights that come to the same."""

    def named(template: str, *weights: float) -> dict[str, Any]:
        mix = [SourceConfig(path=f"{number}.jsonl", weight=w) for number, w in enumerate(weights)]
        data = DataConfig(mix=mix, prompt_template=template)
        sources = [DataSource(key, s.path, s.path, s) for key, s in data.sources().items()]
        return data_identity(data, sources)

    (tmp_path / "elsewhere").mkdir()
    here = template_file(tmp_path, "{{ a }}")
    there = template_file(tmp_path / "elsewhere", "{{ a }}")
    assert named(here, 1, 3) == named(there, 2, 6)
    assert named(here, 1, 3) != named(here, 3, 1)
    before = named(here, 1, 3)
    template_file(tmp_path, "{{ b }}")
    assert named(here, 1, 3) != before


def test_a_chat_without_a_template_is_refused_in_the_pre_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checking a job tries the template on a conversation as long as the data's."""
    tokenizer.chat_template = None
    monkeypatch.setattr(base_model, "load_tokenizer", lambda *_: tokenizer)
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": CONVERSATION}])
    config = Config(
        model=ModelConfig(path="random://tiny"),
        data=DataConfig(path=str(path), prompt_template="chat"),
    )
    (problem,) = preflight.prepare(config).problems
    assert "no chat template" in problem


def test_rows_that_a_chat_template_refuses_all_are_told_before_the_start(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """With the template's reason; what it does not use is counted where rows are used."""
    name = str(write_rows(tmp_path / "rows.jsonl", [{"messages": CONVERSATION}] * 3))
    data = DataConfig(path=name, prompt_template="chat")
    assert find_problems(data, tokenizer) == []
    tokenizer.chat_template = (
        "{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    (problem,) = find_problems(data, tokenizer)
    assert "no row is left to train on" in problem
    assert "3 dropped (the chat template refuses it: too long; first: row 1)" in problem


def test_what_rows_say_in_vain_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """Once for the run, with the number of rows."""
    answer = {**CONVERSATION[2], "name": "Ada", "weight": 1}
    rows = [{"messages": [CONVERSATION[1], answer]}] * 2 + [{"messages": CONVERSATION}]
    counts = build(rows, tokenizer, "chat").counts
    assert counts.notes == {"the chat template does not use name": 2}
    assert counts.summary() == (
        "3 rows read, 3 used, the chat template does not use name (rows: 2)"
    )


@pytest.mark.slow
def test_a_sweep_over_templates_runs_to_the_end(tmp_path: Path, finetune: Command) -> None:
    """Chat, text and a user's file on the same rows: trained, scored, samples answered."""
    user, assistant = CONVERSATION[1:3]
    rows: list[Any] = [
        {"messages": [user, assistant] * (1 + i % 2), "text": f"All of {i}.", "q": f"{i}?",
         "output": "Yes."}
        for i in range(20)
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", [*rows, {"messages": [user]}])
    (tmp_path / "own.jinja").write_text("Q: {{ question }}\nA:\n", encoding="utf-8")
    done = finetune(
        *TINY, "data=chat", "data.path=rows.jsonl", "+data.columns.question=q",
        "data.prompt_template=chat,text,own.jinja", "training.max_steps=2", "--multirun",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("21 rows read, 16 used, 1 dropped (") == 3
    found = {
        json.loads(path.read_text(encoding="utf-8"))[-1]["prompt"]
        for path in tmp_path.glob("outputs/*/samples.json")
    }
    assert len(found) == 3
    assert "Q: 19?\nA:\n" in found
    assert "All of 19." in found
    (copy,) = tmp_path.glob("outputs/*/prompt.jinja")
    assert copy.read_text(encoding="utf-8") == "Q: {{ question }}\nA:\n"


@pytest.mark.slow
def test_the_default_models_chat_template() -> None:
    """SmolLM2-135M-Instruct: two responses, each with its end; the system turn is its own."""
    smollm2 = load_tokenizer(ModelConfig(), find_model(ModelConfig()))
    assert find_chat_problems(smollm2) == []
    (example,) = build([{"messages": CONVERSATION[1:]}], smollm2, "chat").train
    assert learned(example, smollm2) == "Yes, one.<|im_end|>\nNo.<|im_end|>\n"
    assert "You are a helpful AI assistant" in str(smollm2.decode(example["input_ids"]))


@pytest.mark.parametrize("history", [None, [("Who?", "I.")], [("a", "b"), ("c", "d")]])
@pytest.mark.parametrize("given", ["", "two lines\nof input"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_alpaca_prompt_is_the_same_as_a_file(
    system: str | None, given: str, history: Any
) -> None:
    """What lies beside an adapter renders what was trained."""
    fields = {"instruction": "Say {it}.", "input": given, "system": system, "history": history}
    template = load_template("alpaca")
    (asked, _) = template.render({**fields, "output": "-"})
    for environment in (Environment(), Environment(**JINJA)):  # noqa: S701  # a prompt is no page
        assert environment.from_string(str(template.jinja)).render(fields) == asked.content


@pytest.mark.parametrize("name", ["alpaca", "text", "chat", "own.jinja"])
def test_tokenizer_and_prompt_are_saved_together(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A prompt as a jinja2 file; the chat template is in the tokenizer."""
    (tmp_path / "own.jinja").write_text("Q: {{ question }}\nA:", encoding="utf-8")
    folder = tmp_path / "adapter"
    save_prompt(str(tmp_path / name) if "." in name else name, tokenizer, folder)
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "prompt.jinja").is_file() == (name != "chat")
    if name == "own.jinja":
        assert (folder / "prompt.jinja").read_text(encoding="utf-8").startswith("Q: {{ question }}")
