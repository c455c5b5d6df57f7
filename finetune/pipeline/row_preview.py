"""Preview of a run's rows: their tokens and labels, lengths, and what was left out.

Built by the code that builds the run's own rows, from the tokenizer alone: no weight is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from finetune.config.inputs import DataSource
from finetune.config.overrides import compose_job
from finetune.config.schema import Config
from finetune.data import dataset
from finetune.data.dataset import Examples
from finetune.data.token_display import (
    decode,
    describe_marks,
    find_spans,
    render_brackets,
    render_colour,
    render_histogram,
)
from finetune.data.token_rows import IGNORED, Example, Origin, example_lengths
from finetune.escaping import for_terminal
from finetune.models import base_model
from finetune.pipeline.preflight import find_row_problems
from finetune.pipeline.session import Session
from finetune.problems import Refused


@dataclass(frozen=True)
class Preview:
    """The rows of one run; `examples` are not packed, also with training.sequence_packing."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    sources: list[DataSource]
    examples: Examples
    summary: str  # what became of the rows

    @property
    def rows(self) -> Iterator[tuple[Origin, Example, str]]:
        """Yield origin, tokens and use: rows to train on in their order first.

        In this order they were drawn; training shuffles them in each epoch.
        """
        found = self.examples
        for origins, examples, use in (
            (found.train_origins, found.train, "to train on"),
            (found.validation_origins, found.validation, "to validate on"),
            (found.heldout_origins, found.heldout, "held out for evaluation"),
        ):
            yield from ((*one, use) for one in zip(origins, examples, strict=True))


def load_preview(overrides: Sequence[str]) -> Preview:
    """Compose a job and build its rows.

    Raises:
        Refused: the settings, the model or the rows have problems.
    """
    config = compose_job(overrides)
    if config.training.is_skipped:
        raise Refused(["training=none trains on no rows; leave it out to preview them"])
    session = Session()
    problems = find_row_problems(config, session)
    if problems:
        raise Refused(problems)
    tokenizer = session.tokenizer(config.model, base_model.find_model(config.model))
    sources = dataset.find_sources(config.data)
    read = dataset.read_sources(sources)
    separate = replace(config.training, sequence_packing=False)
    try:
        examples = dataset.build_examples(read, config.data, separate, tokenizer)
    except ValueError as error:  # no row can be used
        raise Refused([str(error)]) from None
    if config.training.sequence_packing:
        dataset.join_rows(examples, config.training.max_length)  # to count the sequences
    return Preview(config, tokenizer, sources, examples, examples.counts.summary())


def print_preview(preview: Preview, num_rows: int, console: Console) -> None:
    """Print counts, lengths and the first rows; without colours, learned tokens are in brackets."""
    for line in _describe(preview):
        console.print(Text(for_terminal(line)), soft_wrap=True)
    is_coloured = console.color_system is not None and not console.no_color
    marks = "on green" if is_coloured else "in brackets"
    for origin, example, use in islice(preview.rows, num_rows):
        title = f"{origin.name(preview.sources)}, {use}: {describe_marks(example)} ({marks})"
        console.print()
        console.print(Rule(Text(for_terminal(title)), align="left", characters="-"))
        spans = find_spans(example, preview.tokenizer)
        text = render_colour(spans) if is_coloured else Text(for_terminal(render_brackets(spans)))
        console.print(text, soft_wrap=not console.is_terminal)


def _describe(preview: Preview) -> Iterator[str]:
    config, examples = preview.config, preview.examples
    yield f"model.path={config.model.path}, data.prompt_template={config.data.prompt_template}"
    yield f"data: {preview.summary}"
    learned = sum(label != IGNORED for _, one, _ in preview.rows for label in one["labels"])
    parts = [p for p in (examples.train, examples.validation, examples.heldout) if len(p)]
    lengths = [int(length) for part in parts for length in example_lengths(part)]
    split = f"{len(examples.train)} rows to train on, {len(examples.validation)} to validate on"
    if examples.heldout:
        split += f", {len(examples.heldout)} held out for evaluation"
    share = f"{learned / sum(lengths):.1%} of them learned"
    yield f"{split}; {sum(lengths)} tokens, {share}"
    cut, drawn = examples.counts.truncated, examples.counts.drawn
    yield (
        f"{cut} of {drawn} rows ({cut / drawn:.1%}) are cut at "
        f"training.max_length={config.training.max_length}"
    )
    yield ""
    yield f"tokens a row: {min(lengths)} to {max(lengths)}, median {median(lengths):g}"
    yield from render_histogram(lengths)


def write_json(preview: Preview, num_rows: int | None) -> None:
    """Print one JSON object a row on standard output, and the counts on standard error."""
    for line in _describe(preview):
        print(for_terminal(line), file=sys.stderr)
    for origin, example, _ in islice(preview.rows, num_rows):
        source = {"source": str(preview.sources[origin.source])} if len(preview.sources) > 1 else {}
        tokens = preview.tokenizer.convert_ids_to_tokens(example["input_ids"])
        row = {
            "row": origin.row,
            **source,
            "text": decode(example["input_ids"], preview.tokenizer),
            "input_ids": list(example["input_ids"]),
            "labels": list(example["labels"]),
            "tokens": [str(token) for token in tokens],
        }
        print(json.dumps(row))
