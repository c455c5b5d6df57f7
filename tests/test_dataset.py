"""Rows: every one is read, checked, counted, put into the prompt and masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.config.inputs import DataSource
from finetune.config.schema import DataConfig, SourceConfig, TrainingConfig
from finetune.data.dataset import (
    Examples,
    build_examples,
    find_problems,
    find_sources,
    longest_batch,
    read_sources,
)
from finetune.data.plain_tokens import NO_EOS
from finetune.data.row_draw import share_sizes
from finetune.data.sources import read_file
from finetune.data.token_rows import IGNORED
from finetune.data.turns import SURROGATE
from finetune.tracking.events import read_events
from tests.conftest import TINY, Command, write_rows
from tests.tokenizer_kinds import WITHOUT_EOS

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Say {i}.", "input": "" if i % 2 else "loud", "output": f"It is {i}."}
    for i in range(10)
]


def build(rows: list[Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Examples:
    training = TrainingConfig(max_length=settings.pop("max_length", 512))
    data = DataConfig(path="rows.jsonl", **settings)
    return build_examples([(source(data), rows)], data, training, tokenizer)


def source(data: DataConfig, number: int = 0) -> DataSource:
    key, settings = list(data.sources().items())[number]
    return DataSource(key, settings.path, "", settings)


def build_mix(
    tokenizer: PreTrainedTokenizerBase, sources: dict[str, tuple[float, int]], **settings: Any
) -> Examples:
    """Mix sources, each a name with its weight and number of rows."""
    mix = [SourceConfig(path=name, weight=weight) for name, (weight, _) in sources.items()]
    data = DataConfig(mix=mix, prompt_template="text", **settings)
    read = [
        (source(data, place), [{"text": f"{name} {row}"} for row in range(count)])
        for place, (name, (_, count)) in enumerate(sources.items())
    ]
    return build_examples(read, data, TrainingConfig(), tokenizer)


def names(built: Examples, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return each example's text."""
    return [str(tokenizer.decode(e["input_ids"], skip_special_tokens=True)) for e in built.train]


def test_the_prompt_is_alpacas_and_only_the_response_is_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The text around the fields is Stanford Alpaca's, the labels are the response and its end."""
    (example,) = build([ROWS[0]], tokenizer).train
    text = tokenizer.decode(example["input_ids"])
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 0.\n\n### Input:\nloud\n\n### Response:\nIt is 0.</s>"
    )
    learned = [t for t in example["labels"] if t != IGNORED]
    assert tokenizer.decode(learned) == "It is 0.</s>"
    (without,) = build([ROWS[1]], tokenizer).train
    assert "### Input" not in tokenizer.decode(without["input_ids"])


def test_half_a_character_leaves_out_its_row(tokenizer: PreTrainedTokenizerBase) -> None:
    """In a prompt or an output, in every template; the others are used, and memory is estimated."""
    rows = [*ROWS[:2], {**ROWS[2], "output": "Paris \ud83d"}, {**ROWS[3], "instruction": "\udc00"}]
    built = build(rows, tokenizer)
    assert built.counts.drawn == 2
    assert built.counts.dropped == {SURROGATE: 2}
    assert built.counts.first == {SURROGATE: 3}
    data = DataConfig(path="rows.jsonl")
    assert longest_batch([(source(data), rows)], data, TrainingConfig(), tokenizer) > 0


def test_what_later_rows_have_is_counted_too(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The first 200 rows say the shape; a row of another one is left out, and named."""
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(250)]
    talk = [{"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Say."}]
    late: list[dict[str, Any]] = [{"messages": talk}, {**rows[0], "input": "loudly", "id": 3}]
    data = DataConfig(path=str(write_rows(tmp_path / "rows.jsonl", [*rows, *late])))
    assert find_problems(data, tokenizer) == []
    for _ in range(2):  # from the file, and from the cache
        examples = build_examples(
            read_sources(find_sources(data)), data, TrainingConfig(), tokenizer
        )
        counts = examples.counts
        assert counts.drawn == 251
        assert counts.first == {"it is of another shape than the rows used: OpenAI messages": 251}
        assert (counts.unused, counts.absent) == (["messages", "id"], [])
    assert "loudly" in str(tokenizer.decode(examples.train[250]["input_ids"]))


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        ("alpaca", {"instruction": "x" * 600, "output": "y"}, "fills training.max_length=512"),
        ("alpaca", {"instruction": "x", "output": "y\ud800"}, "it holds a lone surrogate"),
        ("text", {"text": "y\ud800"}, "it holds a lone surrogate"),
        ("text", {"text": "</s>"}, "it has no token to learn"),
    ],
)
def test_rows_that_all_have_a_fault_are_refused_before_the_start(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str, row: object, reason: str
) -> None:
    """With the reason and the first row's number."""
    path = write_rows(tmp_path / "rows.jsonl", [row, row])
    (problem,) = find_problems(DataConfig(path=str(path), prompt_template=template), tokenizer)
    assert (
        f"data.path={path}: no row is left to train on: 2 rows read, 0 used, 2 dropped" in problem
    )
    assert reason in problem


@pytest.mark.parametrize("template", ["alpaca", "text"])
def test_a_tokenizer_without_an_end_is_refused_before_the_start(
    tmp_path: Path, template: str
) -> None:
    """Its responses could not end."""
    path = write_rows(tmp_path / "rows.jsonl", [{**ROWS[0], "text": "x"}])
    data = DataConfig(path=str(path), prompt_template=template)
    assert find_problems(data, WITHOUT_EOS()) == [NO_EOS]


def test_without_a_mask_all_but_the_first_token_is_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """data.mask_prompt=false learns the prompt too."""
    (example,) = build([ROWS[1]], tokenizer, mask_prompt=False).train
    assert example["labels"][0] == IGNORED
    assert example["labels"][1:] == example["input_ids"][1:]


def test_every_row_left_out_or_cut_is_counted_with_its_reason(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Nothing vanishes without a number."""
    rows = [
        *ROWS,
        {"instruction": "", "input": "", "output": "x"},
        {"instruction": "x", "input": None, "output": None},
        {"instruction": 7, "input": "", "output": "x"},
        {"instruction": "y", "input": "", "output": "long " * 100},
        {"instruction": "long " * 200, "input": "", "output": "x"},
        {"instruction": " ", "input": "", "output": "x"},
    ]
    built = build(rows, tokenizer, max_length=300)
    assert built.counts.dropped == {
        "instruction is empty": 2,
        "output is null": 1,
        "instruction is not text": 1,
        "prompt alone fills training.max_length=300": 1,
    }
    assert built.counts.first["instruction is empty"] == 11
    assert built.counts.truncated == 1
    assert (built.counts.read, built.counts.drawn, len(built.train)) == (16, 11, 11)
    assert "2 dropped (instruction is empty; first: row 11)" in built.counts.summary()


def test_nothing_left_is_an_error_with_the_first_row(tokenizer: PreTrainedTokenizerBase) -> None:
    """A file of unusable rows names the first."""
    rows = [{"instruction": "x", "input": "", "output": ""}] * 3
    with pytest.raises(ValueError, match=r"no row is left.*output is empty; first: row 1"):
        build(rows, tokenizer)


def test_the_largest_batch_is_one_of_rows_that_are_kept(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Prompts that leave no room for a response are longer, and are not trained on."""
    too_long = {"instruction": "very " * 400, "input": "", "output": "yes"}
    data, training = DataConfig(path="rows.jsonl"), TrainingConfig(batch_size=1, max_length=200)
    kept = build(ROWS, tokenizer, max_length=200)
    longest = max(len(example["input_ids"]) for example in kept.train)
    rows = [too_long] * 9 + ROWS
    assert longest_batch([(source(data), rows)], data, training, tokenizer) == longest


def test_rows_are_drawn_by_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same seed draws the same rows, another one others, and never more than there are."""

    def drawn(seed: int, num_examples: int) -> list[list[int]]:
        training = TrainingConfig(seed=seed)
        data = DataConfig(path="rows.jsonl", num_examples=num_examples)
        built = build_examples([(source(data), ROWS)], data, training, tokenizer)
        assert built.counts.missing == max(0, num_examples - len(ROWS))
        return [e["input_ids"] for e in built.train]

    assert drawn(1, 5) == drawn(1, 5) != drawn(2, 5)
    assert len(drawn(1, 5)) == 5
    assert len(drawn(1, 50)) == 10


def test_the_validation_share_is_apart_from_training(tokenizer: PreTrainedTokenizerBase) -> None:
    """Held-out rows are not trained on, and together they are all rows."""
    built = build(ROWS, tokenizer, validation_fraction=0.3)
    train = {tuple(e["input_ids"]) for e in built.train}
    validation = {tuple(e["input_ids"]) for e in built.validation}
    assert (len(train), len(validation), len(train | validation)) == (7, 3, 10)


def test_a_mix_gives_each_source_its_share(tokenizer: PreTrainedTokenizerBase) -> None:
    """Weights are shares of num_examples, no row comes twice, and counts are by source."""
    built = build_mix(tokenizer, {"a": (3, 40), "b": (1, 40)}, num_examples=20)
    texts = names(built, tokenizer)
    assert len(set(texts)) == 20
    assert [sum(text.startswith(name) for text in texts) for name in "ab"] == [15, 5]
    assert {key: own.drawn for key, own in built.counts.sources.items()} == {
        "data.mix.0.path=a": 15, "data.mix.1.path=b": 5,
    }  # fmt: skip
    assert built.counts.summary() == (
        "80 rows read, 20 used; data.mix.0.path=a: 40 rows read, 15 used; "
        "data.mix.1.path=b: 40 rows read, 5 used"
    )


def test_a_source_too_short_for_its_share_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    """It gives what it has, the others give no more for it, and the gap is counted."""
    built = build_mix(tokenizer, {"a": (1, 3), "b": (1, 40)}, num_examples=20)
    assert (built.counts.drawn, built.counts.missing) == (13, 7)
    assert (
        "path=a: 3 rows read, 3 used, 7 fewer than data.num_examples asks for"
        in built.counts.summary()
    )


def test_one_weight_leaves_the_other_sources_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    """A sweep of weights compares the same rows, more or fewer of them."""
    few = build_mix(tokenizer, {"a": (1, 40), "b": (1, 40)}, num_examples=10)
    more = build_mix(tokenizer, {"a": (1, 40), "b": (3, 40)}, num_examples=20)
    assert set(names(few, tokenizer)) < set(names(more, tokenizer))


@pytest.mark.parametrize(
    ("weights", "available", "num_examples", "sizes"),
    [
        ([1], [7], None, [7]),
        ([1], [7], 9, [9]),
        ([0.5, 0.5], [10, 4], None, [4, 4]),
        ([3, 1], [10, 4], None, [10, 3]),
        ([0.1, 0.2, 0.7], [100, 100, 70], None, [10, 20, 70]),
        ([1, 1, 1], [9, 9, 9], 10, [4, 3, 3]),
        ([2, 1], [0, 9], None, [0, 0]),
    ],
)
def test_shares(
    weights: list[float], available: list[int], num_examples: int | None, sizes: list[int]
) -> None:
    """In proportion to the weights, and without num_examples as many as there can be."""
    assert share_sizes(weights, available, num_examples) == sizes


def test_columns_can_be_named_for_all_sources_and_for_one(tmp_path: Path) -> None:
    """data.columns maps the template's fields to the columns; a source may differ."""
    one = write_rows(tmp_path / "a.jsonl", [{"q": "a", "output": "b"}])
    other = write_rows(tmp_path / "b.jsonl", [{"question": "a", "output": "b"}])
    assert find_problems(DataConfig(path=str(one), columns={"instruction": "q"}), None) == []
    mix = [
        SourceConfig(path=str(one)),
        SourceConfig(path=str(other), columns={"instruction": "question"}),
    ]
    assert find_problems(DataConfig(mix=mix, columns={"instruction": "q"}), None) == []


def test_all_problems_of_a_mix_are_told_together(tmp_path: Path) -> None:
    """Each source's own, with its key, beside the template's."""
    path = write_rows(tmp_path / "a.jsonl", [{"ask": "a", "reply": "b"}])
    mix = [SourceConfig(path="none.jsonl"), SourceConfig(path=str(path))]
    problems = find_problems(DataConfig(mix=mix), None)
    assert [problem.partition("=")[0] for problem in problems] == [
        "data.mix.0.path", "data.mix.1.path",
    ]  # fmt: skip
    assert "no column 'instruction', 'output'" in problems[1]
    assert problems[1].endswith(
        "Set ++data.mix.1.columns.instruction=COLUMN ++data.mix.1.columns.output=COLUMN"
    )
    data = DataConfig(path="none.jsonl", prompt_template="none.jinja")
    assert ["there is no file" in problem for problem in find_problems(data, None)] == [True, True]


@pytest.mark.slow
def test_a_sweep_over_a_mixs_weight_runs_to_the_end(tmp_path: Path, finetune: Command) -> None:
    """Two files of different columns; counts by source are recorded, and both datasets told."""
    write_rows(tmp_path / "one.jsonl", list(ROWS))
    write_rows(tmp_path / "two.jsonl", [{"q": f"{i}?", "output": "Yes."} for i in range(6)])
    done = finetune(
        *TINY, "data=mix", "evaluation=none", "training.max_steps=2",
        "data.mix=[{path: one.jsonl}, {path: two.jsonl, columns: {instruction: q}}]",
        "data.mix.0.weight=1,3", "data.num_examples=12", "--multirun",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "data.mix.0.path=one.jsonl: 10 rows read, 9 used" in done.stderr
    counts = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/data.json")]
    drawn = [[own["drawn"] for own in count["sources"].values()] for count in counts]
    assert sorted(drawn) == [[6, 6], [9, 3]]
    for path in tmp_path.glob("outputs/*/events.jsonl"):
        told = [event["name"] for event in read_events(path) if event["event"] == "dataset"]
        assert told == ["one", "two"]


def test_real_alpaca_rows_are_all_accounted_for(
    shared_data: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rows used and dropped add up to the rows of the file."""
    rows = read_file(shared_data / "alpaca_999.jsonl", name="alpaca")
    built = build(rows, tokenizer, max_length=1024)
    assert built.counts.drawn + sum(built.counts.dropped.values()) == len(rows) == 999


def test_every_example_says_its_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Also where rows were left out, drawn at random, held out and joined."""
    rows = [{"text": f"the number {n}" if n % 3 else " "} for n in range(1, 31)]
    data = DataConfig(path="x", prompt_template="text", num_examples=15, validation_fraction=0.2)
    for packing in (False, True):
        training = TrainingConfig(max_length=64, sequence_packing=packing)
        built = build_examples([(source(data), rows)], data, training, tokenizer)
        origins = [*built.train_origins, *built.validation_origins]
        assert len(origins) == 15
        assert len(built.validation_origins) == 3
        for example, origin in zip(built.validation, built.validation_origins, strict=True):
            assert str(origin.row) in str(tokenizer.decode(example["input_ids"]))
        if not packing:
            for example, origin in zip(built.train, built.train_origins, strict=True):
                assert str(origin.row) in str(tokenizer.decode(example["input_ids"]))


def test_rows_of_another_file_are_validated_on(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """data.validation_path holds them out whole, and the count of both is told."""
    paths = [write_rows(tmp_path / name, list(ROWS)) for name in ("train.jsonl", "other.jsonl")]
    data = DataConfig(path=str(paths[0]), validation_path=str(paths[1]), num_examples=4)
    assert find_problems(data, tokenizer) == []
    built = build_examples(read_sources(find_sources(data)), data, TrainingConfig(), tokenizer)
    assert (len(built.train), len(built.validation)) == (4, 10)
    assert {origin.source for origin in built.train_origins} == {0}
    assert {origin.source for origin in built.validation_origins} == {1}
    assert "14 used, 4 train, 10 validation" in built.counts.summary()


def test_a_fault_of_the_validation_file_names_its_setting(tmp_path: Path) -> None:
    """It is checked as the rows to train on are."""
    rows = write_rows(tmp_path / "a.jsonl", list(ROWS))
    data = DataConfig(path=str(rows), validation_path=str(tmp_path / "none.jsonl"))
    (problem,) = find_problems(data, None)
    assert problem.startswith("data.validation_path=")
