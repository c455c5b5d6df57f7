"""Tables of scores by category, for the report."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.reporting.categories import CategoryScores, score_categories
from finetune.reporting.results import Results
from finetune.reporting.score_tables import Cell, ScoreTable, show_flips, show_p, show_range
from finetune.reporting.verdict import show_difference
from finetune.statistics.comparison import Difference
from finetune.statistics.metrics import show_score

LONGEST_NAME = 80  # characters of a category


def build_category_tables(results: Results) -> list[ScoreTable]:
    """Return a table for each metric of the best run's tasks that have categories."""
    return [_build_table(results, found) for found in score_categories(results)]


def _build_table(results: Results, found: CategoryScores) -> ScoreTable:
    unit = ", points" if found.comparison.is_share else ""
    columns = [
        "category", "questions", "base", "tuned", f"difference{unit}", "95 %", "gained / lost",
        "p, adjusted",
    ]  # fmt: skip
    rows = [list(_cells(one.name, one.difference, found)) for one in found.scores]
    title = f"{found.metric} by category, {found.run}"
    return ScoreTable(title, columns, rows, list(_notes(results, found)))


def _cells(name: str, one: Difference, found: CategoryScores) -> Iterator[Cell]:
    yield Cell(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}...")
    yield Cell(str(one.questions))
    yield Cell(show_score(one.base))
    yield Cell(show_score(one.tuned))
    yield Cell(show_difference(one.value, found.comparison), one.is_significant)
    yield Cell(show_range(one, found.comparison))
    yield Cell(show_flips(one))
    yield Cell(show_p(one.p_adjusted))


def _notes(results: Results, found: CategoryScores) -> Iterator[str]:
    runs = len(results.compared_rows())
    over = f"p is adjusted over these {len(found.scores)} categories (Holm)"
    if runs > 1 and results.selects is None:
        over += f", not for the choice of the best of {runs} runs"
    yield f"{over}; each interval is that of its category alone."
    if found.has_significant:
        yield "Bold: significant after adjustment (adjusted p < .05)."
    if found.left_out:
        yield f"{found.left_out} categories with fewer questions are left out."
    if found.without:
        yield f"{found.without} questions have no category."
