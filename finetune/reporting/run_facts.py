"""Describe what a sweep ran: model, method, data with the rows used, swept settings, hardware."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.reporting.results import Results
from finetune.reporting.settings import Settings, list_values

MOST_VALUES = 8  # of a setting, in a line
MODULES = "lora.target_modules"


def describe_runs(results: Results, settings: Mapping[str, Settings]) -> dict[str, str]:
    """Return what was run, by subject; what no run's files hold is left out."""
    found, environments = list(settings.values()), _read_all(results, "environment.json")
    facts = {
        "runs": _states(results),
        "model": _model(found, environments),
        "method": _method(found),
        "data": _data(found, _read_all(results, "data.json")),
        "training": _training(found),
        "evaluation": _evaluation(results),
        "settings that differ": _swept(results),
        "hardware": _hardware(environments),
    }
    return {subject: text for subject, text in facts.items() if text}


def _read_all(results: Results, name: str) -> list[Mapping[str, Any]]:
    return [found for run in results.runs if (found := run.read_json(name))]


def _states(results: Results) -> str:
    states = Counter(row["status"] for row in results.rows)
    return ", ".join(f"{count} {state}" for state, count in states.most_common())


def _values(settings: Sequence[Settings], key: str) -> str:
    """Return the values of a setting over all runs, `null` ones left out."""
    return _listed(value for value in list_values(settings, key) if value is not None)


def _listed(values: Iterable[Any]) -> str:
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    more = [f"{len(texts) - MOST_VALUES} more"] if len(texts) > MOST_VALUES else []
    return ", ".join([*texts[:MOST_VALUES], *more])


def _named(settings: Sequence[Settings], **keys: str) -> list[str]:
    """Return `NAME VALUES` for each setting that has any."""
    pairs = [(name, _values(settings, key)) for name, key in keys.items()]
    return [f"{name} {values}" for name, values in pairs if values]


def _model(settings: Sequence[Settings], environments: Sequence[Mapping[str, Any]]) -> str:
    quantization = [value for value in list_values(settings, "model.quantization")
                    if value != "none"]  # fmt: skip
    dtypes = dict.fromkeys(one["dtype"] for one in environments if one.get("dtype"))
    parts = [_values(settings, "model.path"), *_named(settings, adapter="model.adapter"),
             _listed(quantization), _listed(dtypes)]  # fmt: skip
    return ", ".join(part for part in parts if part)


def _method(settings: Sequence[Settings]) -> str:
    method = _values(settings, "peft.method")
    if "lora" not in method:
        return method
    modules = list_values(settings, MODULES)
    on = f"on {', '.join(map(str, modules[0]))}" if len(modules) == 1 and modules[0] else ""
    numbers = _named(settings, r="lora.r", alpha="lora.alpha", dropout="lora.dropout")
    return ", ".join(part for part in (method, *numbers, on) if part)


def _data(settings: Sequence[Settings], counts: Sequence[Mapping[str, Any]]) -> str:
    paths = dict.fromkeys(
        str(source.get("path")) if isinstance(source, Mapping) else str(source)
        for one in settings
        for source in one.get("data.mix") or [one.get("data.path")]
        if source is not None
    )
    rows = dict.fromkeys(text for one in counts if (text := _rows(one)))
    return ": ".join(part for part in (_listed(paths), _listed(rows)) if part)


def _rows(counts: Mapping[str, Any]) -> str:
    """Say how many rows of the data were used, and for what."""
    if not isinstance(counts.get("drawn"), int):
        return ""
    text = f"{counts['drawn']:,} of {counts.get('read') or counts['drawn']:,} rows used"
    others = {"to validate": counts.get("validation"), "held out": counts.get("heldout"),
              "truncated": counts.get("truncated")}  # fmt: skip
    return text + "".join(f", {count:,} {name}" for name, count in others.items() if count)


def _training(settings: Sequence[Settings]) -> str:
    steps = _named(settings, **{"max. steps": "training.max_steps"})
    parts = [*(steps or _named(settings, epochs="training.epochs")),
             *_named(settings, batch="training.batch_size",
                     accumulation="training.gradient_accumulation_steps"),
             _values(settings, "optimizer.name"),
             *_named(settings, lr="optimizer.lr"), _values(settings, "optimizer.scheduler"),
             *_named(settings, max_length="training.max_length")]  # fmt: skip
    return ", ".join(part for part in parts if part)


def _evaluation(results: Results) -> str:
    parts = []
    for task, scored in results.scored.items():
        counts = dict.fromkeys(len(table.questions) for table in scored.tables.values())
        known = _listed(f"{count:,}" for count in counts if count)
        parts.append(f"{task} ({known} questions)" if known else task)
    return ", ".join(parts)


def _swept(results: Results) -> str:
    keys = results.record.swept
    values = {key: dict.fromkeys(str(row[key]) for row in results.rows) for key in keys}
    return "; ".join(f"{key}: {_listed(some)}" for key, some in values.items())


def _hardware(environments: Sequence[Mapping[str, Any]]) -> str:
    machines: dict[str, None] = {}
    for one in environments:
        threads = one.get("threads")
        on_cpu = f"CPU, {threads} thread{'s' if threads != 1 else ''}" if threads else ""
        gpus = one.get("gpu")
        parts = (str(gpus) if gpus else on_cpu, one.get("platform"))
        machines[", ".join(str(part) for part in parts if part)] = None
    return "; ".join(name for name in machines if name)
