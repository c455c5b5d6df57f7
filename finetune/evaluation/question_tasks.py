"""The lm-eval task `questions`: a user's own questions, by log-likelihood or by generation.

lm-eval asks, aggregates and estimates errors; what is asked is text as rendered here. A file with
both kinds of questions is a group of two tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from finetune.config.rules import OWN_QUESTIONS
from finetune.config.schema import EvaluationConfig
from finetune.data.questions import Question, QuestionPrompt, normalise, read_questions
from finetune.data.turns import Unusable

NAME = OWN_QUESTIONS
CHOICE, TEXT = f"{NAME}_choice", f"{NAME}_text"  # of a file with both kinds
CHOICE_METRICS = ("acc", "acc_norm", "margin")
TEXT_METRICS = ("exact_match", "contains", "f1")
VERSION = 1.0  # raised when a question would be asked or scored otherwise


@dataclass(frozen=True)
class Asked:
    """A question and its prompt."""

    question: Question
    prompt: str
    delimiter: str  # before an answer

    def document(self) -> dict[str, Any]:
        """Return the question as lm-eval keeps it: plain values of one shape for all."""
        one = self.question
        return {
            "question": one.text,
            "prompt": self.prompt,
            "delimiter": self.delimiter,
            "choices": list(one.choices),
            "gold": one.gold,
            "answers": list(one.answers),
            "category": one.category,
            "id": one.id,
        }


def load_questions(
    evaluation: EvaluationConfig,
    prompt: QuestionPrompt,
    *,
    selects: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Build the task, or the group of tasks, of `evaluation.questions`.

    Args:
        evaluation: names the files.
        prompt: that they are asked in.
        selects: whether those of `evaluation.select_questions` are asked.

    Returns:
        What lm-eval's TaskManager.load returns, and lines on what is worth knowing.

    Raises:
        ValueError: a file holds something else than questions, or they cannot be asked so.
    """
    name = "select_questions" if selects else "questions"
    asked = _ask(getattr(evaluation, name), f"evaluation.{name}", prompt)
    solved: list[Asked] = []
    if evaluation.fewshot_questions is not None:
        solved = _ask(evaluation.fewshot_questions, "evaluation.fewshot_questions", prompt)
    kinds = [kind for kind in KINDS if any(kind.holds(one) for one in asked)]
    configs = [
        kind.build_config(NAME if len(kinds) == 1 else kind.name, asked, solved, evaluation)
        for kind in kinds
    ]
    manager = TaskManager(include_defaults=False)
    loaded = manager.load(configs)
    if len(kinds) > 1:
        metrics = [metric for kind in kinds for metric in kind.metrics]
        loaded = manager.load([build_group(NAME, metrics, loaded["tasks"].values(), VERSION)])
    return dict(loaded), list(_notes(asked, prompt.tokenizer))


def build_group(name: str, metrics: Iterable[str], tasks: Iterable[Task], version: float) -> Group:
    """Return a group of tasks; each metric is the mean over the questions that have it."""
    aggregated = [
        AggMetricConfig(metric=metric, aggregation="mean", weight_by_size=True)
        for metric in metrics
    ]
    group = Group(name, aggregate_metric_list=aggregated, metadata={"version": version})
    for task in tasks:
        group.add(task)
    return group


def _ask(file: str | None, key: str, prompt: QuestionPrompt) -> list[Asked]:
    if file is None:
        raise ValueError(f"{key} names no file; set {key}=FILE")
    found, faults = [], Counter[str]()
    for question in read_questions(file, key):
        try:
            text = prompt.ask(question)
            found.append(Asked(question, text, prompt.delimiter(text)))
        except Unusable as fault:
            faults[str(fault)] += 1
    if faults:
        lines = [f"{count} of its questions: {fault}" for fault, count in faults.items()]
        raise ValueError(f"{key}={file}: {'; '.join(lines)}")
    return found


@dataclass(frozen=True)
class Kind:
    """One kind of questions, which one lm-eval task asks."""

    name: str
    output_type: str
    metrics: tuple[str, ...]

    def holds(self, asked: Asked) -> bool:
        """Return whether a question is of this kind."""
        return bool(asked.question.choices) == (self.output_type == "multiple_choice")

    def build_config(
        self,
        task: str,
        asked: Sequence[Asked],
        solved: Sequence[Asked],
        evaluation: EvaluationConfig,
    ) -> dict[str, Any]:
        """Return the definition of the task, with its questions.

        Args:
            task: its name.
            asked: all questions, of which it takes its own.
            solved: those that solved examples are drawn from; none: from those asked.
            evaluation: the settings of the answers.
        """
        own = [one for one in asked if self.holds(one)]
        splits = {"test": own, "solved": [one for one in solved if self.holds(one)]}
        if solved and not splits["solved"]:
            what = "choices" if self.output_type == "multiple_choice" else "an answer alone"
            raise ValueError(
                f"evaluation.fewshot_questions={evaluation.fewshot_questions} has no question with "
                f"{what}, as evaluation.questions has"
            )
        documents = {split: [one.document() for one in some] for split, some in splits.items()}
        config: dict[str, Any] = {
            "task": task,
            "custom_dataset": partial(build_dataset, documents),
            "test_split": "test",
            "fewshot_split": "solved" if solved else "test",
            "output_type": self.output_type,
            "doc_to_text": _prompt,
            "target_delimiter": "",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in self.metrics
            ],
            "metadata": {"version": VERSION},
        }
        if self.output_type == "multiple_choice":
            return {
                **config,
                "doc_to_choice": _continuations,
                "doc_to_target": _gold,
                "process_results": score_choices,
            }
        return {
            **config,
            "doc_to_target": _answer,
            "process_results": score_text,
            "generation_kwargs": {
                "until": _stops(own), "max_gen_toks": evaluation.max_new_tokens, "do_sample": False
            },
        }  # fmt: skip


CHOICES = Kind(CHOICE, "multiple_choice", CHOICE_METRICS)
TEXTS = Kind(TEXT, "generate_until", TEXT_METRICS)
KINDS = (CHOICES, TEXTS)


def build_dataset(splits: Mapping[str, Sequence[dict[str, Any]]], **_: Any) -> Any:
    """Return documents by split as lm-eval reads them; it passes what it knows of the task."""
    from datasets import Dataset, DatasetDict

    return DatasetDict(
        {name: Dataset.from_list(list(some)) for name, some in splits.items() if some}
    )


def _prompt(doc: dict[str, Any]) -> str:
    return str(doc["prompt"])


def _continuations(doc: dict[str, Any]) -> list[str]:
    return [f"{doc['delimiter']}{choice}" for choice in doc["choices"]]


def _gold(doc: dict[str, Any]) -> int:
    return int(doc["gold"])


def _answer(doc: dict[str, Any]) -> str:
    return f"{doc['delimiter']}{doc['answers'][0]}"


def _stops(asked: Sequence[Asked]) -> list[str]:
    """Return where an answer ends: its line, or its paragraph where an accepted one has lines."""
    has_lines = any("\n" in answer.strip() for one in asked for answer in one.question.answers)
    return ["\n\n"] if has_lines else ["\n"]


def score_choices(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Score a multiple choice as lm-eval does, and by how far the right choice is ahead.

    Args:
        doc: the question.
        results: for each choice its log-likelihood and whether greedy decoding gives it.

    Returns:
        acc, acc_norm (by length in characters), and margin: the right choice's log-likelihood
        minus that of the best other one, in nats.
    """
    likelihoods, gold = [result[0] for result in results], doc["gold"]
    normalised = [x / len(choice) for x, choice in zip(likelihoods, doc["choices"], strict=True)]
    others = [x for place, x in enumerate(likelihoods) if place != gold]
    return {
        "acc": float(_argmax(likelihoods) == gold),
        "acc_norm": float(_argmax(normalised) == gold),
        "margin": likelihoods[gold] - max(others),
    }


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def score_text(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a generated answer against those that are accepted, all normalised.

    Args:
        doc: the question.
        results: the text, alone.

    Returns:
        exact_match: it is one of them; contains: its words hold one of them in order; f1: of its
        words and theirs, the best (Rajpurkar et al. 2016).
    """
    said = normalise(results[0])
    accepted = [normalise(answer) for answer in doc["answers"]]
    return {
        "exact_match": float(said in accepted),
        "contains": float(any(f" {one} " in f" {said} " for one in accepted)),
        "f1": max(word_f1(said, one) for one in accepted),
    }


def word_f1(said: str, accepted: str) -> float:
    """Return the harmonic mean of precision and recall of words, both texts normalised."""
    ours, theirs = said.split(), accepted.split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _notes(asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Yield what is worth knowing about the questions before they are asked."""
    choices = [one.question.choices for one in asked if one.question.choices]
    if choices and tokenizer is not None:
        lengths = [{len(tokenizer.tokenize(choice)) for choice in some} for some in choices]
        if all(len(one) == 1 for one in lengths):
            yield "all choices of a question have equally many tokens, so acc_norm adds little"
