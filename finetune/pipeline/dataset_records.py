"""Record in a run's events which rows it was trained on, and which questions it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.config.inputs import DataSource
from finetune.config.schema import EvaluationConfig
from finetune.data.row_counts import RowCounts
from finetune.evaluation.harness import TaskScore
from finetune.evaluation.tasks import LoadedTask
from finetune.files import digest, slug
from finetune.tracking.events import EventLog


def record_rows(events: EventLog, sources: Sequence[DataSource], counts: RowCounts) -> None:
    """Record each source of a run's rows, with the number of those it was trained on.

    MLflow takes two data sets of one name and digest for one: the digest is of the rows that were
    drawn too.
    """
    for source in sources:
        own = counts.sources.get(str(source), counts)
        trained = own.drawn - own.validation - own.heldout
        used = own.validation if source.is_validation else trained
        profile = {
            "num_rows_read": own.read, "num_rows_validation": own.validation,
            "num_rows_heldout": own.heldout, "num_rows_dropped": sum(own.dropped.values()),
            "num_rows_truncated": own.truncated, "num_tokens": own.tokens,
        }  # fmt: skip
        events.dataset(
            slug(Path(source.location).stem),
            digest=digest([source.digest, used, profile]),
            source=source.location,
            context="validation" if source.is_validation else "training",
            rows=used,
            profile=profile,
        )


def record_questions(
    events: EventLog,
    tasks: Sequence[LoadedTask],
    scores: Mapping[str, TaskScore],
    evaluation: EvaluationConfig,
) -> None:
    """Record each task that a run was scored on, with the number of its questions."""
    for task in tasks:
        if task.key in scores:
            events.dataset(
                slug(task.name),
                digest=task.digest,
                source=_find_source(task, evaluation),
                context="selection" if task.selects else "evaluation",
                rows=len(scores[task.key].items),
            )


def _find_source(task: LoadedTask, evaluation: EvaluationConfig) -> str:
    """Return the files or the data set on the hub that a task's questions come from."""
    if files := evaluation.data_files.get(task.name):
        return ", ".join(dict.fromkeys(files.values()))
    if task.name == "questions" and evaluation.questions is not None:
        return str(evaluation.questions)
    paths = (getattr(one.config, "dataset_path", None) for one in task.tasks.values())
    return ", ".join(dict.fromkeys(str(path) for path in paths if path)) or task.name
