"""The lm-eval task `heldout`: rows that were not learned from, by the tokens of the training.

Perplexity is of the responses' tokens, as a validation loss is. Short answers are also generated:
the task is then a group of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from finetune.config.rules import HELD_OUT
from finetune.config.schema import EvaluationConfig
from finetune.data.heldout import HeldoutRow
from finetune.data.questions import Question
from finetune.evaluation.question_tasks import (
    TEXT_METRICS,
    TEXTS,
    Asked,
    build_dataset,
    build_group,
)
from finetune.evaluation.request_tokens import TokenText

RESPONSES, ANSWERS = f"{HELD_OUT}_responses", f"{HELD_OUT}_answers"  # where some are short
VERSION = 1.0  # raised when a row would be asked or scored otherwise


def load_heldout(
    rows: Sequence[HeldoutRow], evaluation: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Build the task, or the group of tasks, of the rows.

    Args:
        rows: held out.
        evaluation: the settings of the answers.
        tokenizer: the model's, for the texts.

    Returns:
        What lm-eval's TaskManager.load returns.
    """
    short = [row for row in rows if row.is_short]
    documents = [_document(row, tokenizer) for row in rows]
    responses = _Responses(config=_config(RESPONSES if short else HELD_OUT, documents))
    if not short:
        return {"tasks": {HELD_OUT: responses}, "groups": {}, "group_map": {}}
    config = TEXTS.build_config(ANSWERS, [_as_question(row) for row in short], [], evaluation)
    config["num_fewshot"] = 0  # the rows are asked as they were trained
    manager = TaskManager(include_defaults=False)
    (answers,) = manager.load([config])["tasks"].values()
    metrics = ("perplexity", *TEXT_METRICS)
    return dict(manager.load([build_group(HELD_OUT, metrics, (responses, answers), VERSION)]))


def _as_question(row: HeldoutRow) -> Asked:
    question = Question(row=0, text=row.prompt, answers=(row.response,), id=row.name)
    return Asked(question, row.prompt, "")


def _document(row: HeldoutRow, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    tokens, (first, _) = row.example["input_ids"], row.spans[0]
    prompt = row.prompt or tokenizer.decode(tokens[:first])
    return {
        "prompt": prompt,
        "question": prompt,
        "response": row.response,
        "tokens": list(tokens),
        "spans": [list(span) for span in row.spans],
        "texts": [
            [tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:end])]
            for start, end in row.spans
        ],
        "id": row.name,
    }


def _config(task: str, documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": task,
        "custom_dataset": partial(build_dataset, {"test": documents}),
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{response}}",
        "process_results": score_responses,
        "num_fewshot": 0,
        "metric_list": [
            {
                "metric": "perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            }
        ],
        "metadata": {"version": VERSION},
    }


class _Responses(ConfigurableTask):  # type: ignore[misc]  # lm-eval is untyped
    """Asks the likelihood of each response of a row, by the row's own tokens."""

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Return a request for each response, all in the row's own context."""
        tokens, requests = doc["tokens"], []
        spans = zip(doc["spans"], doc["texts"], strict=True)
        for place, ((start, end), (before, said)) in enumerate(spans):
            context = TokenText(before, tokens[:start])
            arguments = (context, TokenText(said, tokens[start:end]))
            requests.append(
                Instance("loglikelihood", doc, arguments, place, metadata=kwargs["metadata"])
            )
        return requests


def score_responses(
    doc: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """Return the responses' log-likelihood and number of tokens, which lm-eval aggregates."""
    num_tokens = sum(end - start for start, end in doc["spans"])
    return {"perplexity": (sum(result[0] for result in results), num_tokens)}
