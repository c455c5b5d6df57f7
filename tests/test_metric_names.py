"""A metric's name is read and written in one place, with the columns made from it."""

from __future__ import annotations

import pytest

from finetune.statistics.metric_names import MetricName


@pytest.mark.parametrize(
    ("text", "task", "name"),
    [
        ("arc_easy/acc", "arc_easy", "acc"),
        ("group/task/acc_norm", "group/task", "acc_norm"),
        ("gsm8k/exact_match_strict-match", "gsm8k", "exact_match_strict-match"),
    ],
)
def test_a_name_is_read_as_it_is_written(text: str, task: str, name: str) -> None:
    """A task's name may have slashes, a metric's has none."""
    found = MetricName.parse(text)
    assert (found.task, found.name) == (task, name)
    assert str(found) == text


def test_a_columns_name_is_that_of_results_csv() -> None:
    """The columns are an interface; `train/loss` and the like are no metric of a task."""
    name = MetricName("arc", "acc")
    columns = [name.base, name.selection, name.stderr, name.difference, name.p, name.p_adjusted]
    assert columns == [
        "arc/base_acc", "arc/select_acc", "arc/acc_stderr", "arc/acc_diff", "arc/acc_p",
        "arc/acc_p_adjusted",
    ]  # fmt: skip


def test_names_are_keys() -> None:
    """Two equal names are one key."""
    assert {MetricName("arc", "acc"): 1}[MetricName.parse("arc/acc")] == 1
