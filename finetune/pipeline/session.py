"""A session: the base, tokenizers, tasks and checks that a process keeps from job to job.

The worker makes one session and passes it down; a caller without one begins with nothing loaded.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.inputs import DataSource, Inputs, Source
from finetune.config.rules import HELD_OUT, OWN_PROMPTS, OWN_QUESTIONS
from finetune.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from finetune.data import dataset, templates
from finetune.data.heldout import count_trained, find_heldout
from finetune.data.leakage import find_leaks
from finetune.data.questions import QuestionPrompt, find_digests, read_questions
from finetune.evaluation import heldout_tasks, question_tasks
from finetune.evaluation.local_data import find_file_digests
from finetune.evaluation.task_folder import find_contents
from finetune.evaluation.tasks import BuildOwn, LoadedTask, load_task
from finetune.models import base_model
from finetune.models.shape import Shape, describe_shape
from finetune.pipeline import samples
from finetune.pipeline.finished_runs import FinishedRuns
from finetune.training import multi_adapter

log = logging.getLogger("finetune")

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """A cache of the newest few values; keys are compared, never hashed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: list[tuple[Any, Value]] = []  # the newest first

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made at its first use."""
        for place, (known, value) in enumerate(self._items):
            if known == key:
                self._items.insert(0, self._items.pop(place))
                return value
        value = make()
        self._items = [(key, value), *self._items][: self._most]
        return value

    def clear(self) -> None:
        self._items = []


class Session:
    """The loaded base, tokenizers and tasks, and the results of checks on them."""

    def __init__(self) -> None:
        self._base: Kept[PreTrainedModel] = Kept(1)  # there is room for one
        self._tokenizers: Kept[PreTrainedTokenizerBase] = Kept(8)
        self._tokenizer_problems: Kept[list[str]] = Kept(8)
        self._tasks: Kept[LoadedTask] = Kept(16)
        self._shapes: Kept[Shape] = Kept(8)
        self._longest: Kept[int] = Kept(64)
        self._row_counts: Kept[int] = Kept(64)
        self._leaks: Kept[list[int]] = Kept(16)
        self._examples: Kept[dataset.Examples] = Kept(1)  # they may be large
        self._meta: Kept[PreTrainedModel] = Kept(2)
        self._row_problems: Kept[list[str]] = Kept(64)
        self._obstacles: Kept[str | None] = Kept(1)
        self._answers: Kept[list[str]] = Kept(1)
        self._warnings: Kept[str | None] = Kept(8)
        self.finished_runs = FinishedRuns()

    def base(self, config: Config, inputs: Inputs) -> PreTrainedModel:
        """Return the base that runs share, frozen and without an adapter, or load a fresh one."""

        def load() -> PreTrainedModel:
            self.release()  # before another one takes its memory
            return base_model.load_base(config.model, inputs.source, torch.device(inputs.device))

        return self._base.get(base_key(config, inputs), load)

    def release(self) -> None:
        """Release the base, which was altered or is not needed any more, and its memory."""
        self._base.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def tokenizer(self, model: ModelConfig, source: Source) -> PreTrainedTokenizerBase:
        return self._tokenizers.get(
            (asdict(model), source), lambda: base_model.load_tokenizer(model, source)
        )

    def tokenizer_problems(self, model: ModelConfig, source: Source) -> list[str]:
        """Return a problem if the tokenizer has ids without an embedding in the base."""

        def look() -> list[str]:
            tokenizer, config = self.tokenizer(model, source), base_model.load_config(model, source)
            return base_model.find_tokenizer_problems(model.path, tokenizer, config)

        return self._tokenizer_problems.get((asdict(model), source), look)

    def tasks(self, config: Config, source: Source | None) -> list[LoadedTask]:
        """Return the tasks to report, then those that choose the best run, where that is asked.

        Args:
            config: names the tasks, and how they are asked.
            source: the model's, needed where its chat template is applied.
        """
        asked = config.evaluation
        reported = [self._task(name, config, source) for name in asked.tasks]
        selecting = {
            name: asked.select_questions if name == OWN_QUESTIONS else asked.select_split
            for name in asked.tasks
            if name != HELD_OUT
        }
        chosen = [name for name, split in selecting.items() if split]
        return reported + [self._task(name, config, source, selects=True) for name in chosen]

    def _task(
        self, name: str, config: Config, source: Source | None, *, selects: bool = False
    ) -> LoadedTask:
        asked, tokenizer, model = config.evaluation, None, None
        if source is not None and (asked.chat_template or name in OWN_PROMPTS):
            tokenizer, model = self.tokenizer(config.model, source), asdict(config.model)
        own: Any = None
        build: BuildOwn | None = None
        if name == OWN_QUESTIONS:
            trained = config.data.prompt_template
            prompt = QuestionPrompt.load(asked.prompt_template, trained, tokenizer)
            own = prompt.text, find_digests(asked)
            build = partial(question_tasks.load_questions, asked, prompt, selects=selects)
        elif name == HELD_OUT:
            assert source is not None, "rows have the tokens of some model"
            found = dataset.find_sources(config.data)
            own = asdict(config.data), asdict(config.training), [one.digest for one in found]
            build = partial(self._load_heldout, config, source, found)
        else:
            own = find_contents(asked, name), find_file_digests(asked, name)
        key = name, selects, asdict(asked), own, model, source if model else None
        return self._tasks.get(
            key, lambda: load_task(name, asked, tokenizer, selects=selects, build=build)
        )

    def _load_heldout(
        self, config: Config, source: Source, found: Sequence[DataSource]
    ) -> tuple[dict[str, Any], list[str]]:
        """Build the task `heldout`; it is noted where its rows are trained on as well."""
        tokenizer = self.tokenizer(config.model, source)
        examples = self._build(config, source, found)
        rows = find_heldout(dataset.read_sources(found), examples, config.data, tokenizer)
        if not rows:
            raise ValueError(
                f"evaluation.tasks has {HELD_OUT}, but of the rows none is held out; raise "
                "data.heldout_fraction or data.validation_fraction"
            )
        notes = []
        if count := count_trained(rows, examples):
            notes.append(
                f"{count} of {len(rows)} held-out rows stand in the rows to train on too; remove "
                "rows that repeat others"
            )
        return heldout_tasks.load_heldout(rows, config.evaluation, tokenizer), notes

    def meta_model(self, model: ModelConfig, source: Source) -> PreTrainedModel:
        """Return the base without weights, to look at."""

        def build() -> PreTrainedModel:
            return base_model.load_meta_model(model, base_model.load_config(model, source))

        return self._meta.get((asdict(model), source), build)

    def shape(self, model: ModelConfig, source: Source) -> Shape:
        """Return the base's sizes."""
        return self._shapes.get(
            (asdict(model), source), lambda: describe_shape(self.meta_model(model, source))
        )

    def row_problems(self, config: Config, source: Source | None) -> list[str]:
        """Return what is wrong with the rows, read once for as long as their files stay the same.

        Args:
            config: names the rows.
            source: the model's, whose tokenizer they are tried on; None where there is none.
        """
        rows, training, tokenizer = config.data, config.training, None
        if source is not None:
            tokenizer = self.tokenizer(config.model, source)
        try:
            contents = [one.digest for one in dataset.find_sources(rows)]
            contents.append(templates.load_template(rows.prompt_template).file_text or "")
        except (OSError, ValueError):
            return dataset.find_problems(rows, tokenizer, training)  # which names what is missing
        key = asdict(rows), training.max_length, asdict(config.model), source, contents
        return self._row_problems.get(key, lambda: dataset.find_problems(rows, tokenizer, training))

    def longest_batch(self, config: Config, source: Source, found: Sequence[DataSource]) -> int:
        """Return the most tokens that a micro-batch can have."""
        rows: DataConfig = config.data
        training = TrainingConfig(
            batch_size=config.training.batch_size, max_length=config.training.max_length
        )

        def measure() -> int:
            read = dataset.read_sources(found)
            return dataset.longest_batch(read, rows, training, self.tokenizer(config.model, source))

        digests = [one.digest for one in found]
        key = (asdict(rows), asdict(training), asdict(config.model), source, digests)
        return self._longest.get(key, measure)

    def count_rows(self, found: Sequence[DataSource]) -> int:
        """Return how many rows there are, those of `data.validation_path` too."""

        def count() -> int:
            return sum(len(rows) for _, rows in dataset.read_sources(found))

        return self._row_counts.get([one.digest for one in found], count)

    def leaks(self, config: Config, found: Sequence[DataSource]) -> list[int]:
        """Return the numbers of the user's questions that stand in the rows to train on."""
        file = config.evaluation.questions
        if file is None or config.training.is_skipped:
            return []

        def look() -> list[int]:
            rows = (row for _, rows in dataset.read_sources(found) for row in rows)
            questions = read_questions(file, "evaluation.questions")
            return [one.row for one in find_leaks(questions, rows)]

        return self._leaks.get((file, [one.digest for one in found]), look)

    def examples(self, config: Config, inputs: Inputs) -> dataset.Examples:
        """Return the tokenised rows of a run, the last ones kept for its samples."""
        return self._build(config, inputs.source, inputs.data)

    def _build(
        self, config: Config, source: Source, found: Sequence[DataSource]
    ) -> dataset.Examples:
        tokenizer = self.tokenizer(config.model, source)

        def build() -> dataset.Examples:
            rows = dataset.read_sources(found)
            return dataset.build_examples(rows, config.data, config.training, tokenizer)

        key = asdict(config.data), asdict(config.training), asdict(config.model), source
        return self._examples.get((*key, [one.digest for one in found]), build)

    def obstacle(self, config: Config, inputs: Inputs, rows: Sequence[list[int]]) -> str | None:
        """Return why adapters cannot be trained together on the base; the Trainer then trains them.

        Args:
            config: of a run on the base.
            inputs: of the same run.
            rows: the shortest and the longest one's tokens.
        """

        def look() -> str | None:
            return multi_adapter.find_obstacle(self.base(config, inputs), rows)

        return self._obstacles.get((*base_key(config, inputs), list(rows)), look)

    def warn_once(self, find: Callable[[], str | None]) -> None:
        """Log what there is to warn of, at the first call with a function; None is nothing."""

        def look() -> str | None:
            if (text := find()) is not None:
                log.warning(text)
            return text

        self._warnings.get(find, look)

    def base_answers(
        self, config: Config, inputs: Inputs, prompts: Sequence[Sequence[int]]
    ) -> list[str]:
        """Return what the base answers to prompts, given by their tokens."""

        def answer() -> list[str]:
            tokenizer = self.tokenizer(config.model, inputs.source)
            return samples.answer(self.base(config, inputs), tokenizer, prompts)

        key = (*base_key(config, inputs), [list(prompt) for prompt in prompts])
        return self._answers.get(key, answer)


def base_key(config: Config, inputs: Inputs) -> tuple[Any, ...]:
    """Return what tells one loaded base from another."""
    return asdict(config.model), asdict(inputs.source), inputs.device
