"""Settings of a sweep's runs as flat texts, and those that differ between any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.config.schema import CONDUCT, Config, flatten, marked
from finetune.problems import Refused
from finetune.reporting.results import Results
from finetune.tracking.run_folder import RunFolder

Settings = Mapping[str, Any]  # by key, such as lora.r; interpolations unresolved


def read_settings(results: Results) -> dict[str, Settings]:
    """Return the settings of each run whose config.yaml can be read, by the run's name."""
    found = {run.name: read_run_settings(run) for run in results.runs}
    return {name: one for name, one in found.items() if one}


def read_run_settings(run: RunFolder) -> Settings:
    """Return a run's settings without those of its sweep; none where they cannot be read."""
    try:
        settings = run.read_settings()
    except Refused:  # it has not begun, or the file is damaged, which the remarks say
        return {}
    conduct = marked(Config, CONDUCT)
    return dict(flatten({key: one for key, one in settings.items() if key not in conduct}))


def list_values(settings: Sequence[Settings], key: str) -> list[Any]:
    """Return the values of a setting, each once."""
    values: list[Any] = []
    for one in settings:
        if key in one and one[key] not in values:
            values.append(one[key])
    return values


def find_differences(results: Results, settings: Mapping[str, Settings]) -> dict[str, Any]:
    """Return the settings that differ between any two runs, compact for the page.

    Returns:
        `runs`: labels; `keys`: by setting its values and, for each run, the number of its value;
        `first`: the numbers of the runs to compare first, the best one and the others.
    """
    rows = [row for row in results.rows if row["run"] in settings]
    texts = [{key: _text(value) for key, value in settings[row["run"]].items()} for row in rows]
    keys = dict.fromkeys(key for one in texts for key in one)
    found = {}
    for key in keys:
        values = [one.get(key, "not set") for one in texts]
        known = list(dict.fromkeys(values))
        if len(known) > 1:
            found[key] = {"values": known, "of": [known.index(value) for value in values]}
    best = results.best_run()
    first = sorted(range(len(rows)), key=lambda number: rows[number]["run"] != best)
    return {"runs": [results.label(row) for row in rows], "keys": found, "first": first[:2]}


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
