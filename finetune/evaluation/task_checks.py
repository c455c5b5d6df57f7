"""Checks of a user's lm-eval tasks (`evaluation.include_path`) before anything is loaded.

lm-eval warns of most of these mistakes, passes over them, or ends with an error of Python's.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import lm_eval.filters
import lm_eval.utils
from jinja2 import TemplateSyntaxError
from lm_eval.api.group import Group
from lm_eval.api.registry import aggregation_registry, filter_registry, metric_registry
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from finetune.config.schema import EvaluationConfig
from finetune.evaluation.task_folder import (
    TRUST,
    Definition,
    Function,
    Leaf,
    find_code_problems,
    find_local_files,
)
from finetune.problems import first_line, nearest

KEYS = (*(one.name for one in fields(TaskConfig)), "group", "task_list")
REQUIRED = ("dataset_path", "doc_to_text", "doc_to_target")
# The metrics that lm-eval computes by itself, by output type; of generate_until all.
COMPUTED: dict[str, tuple[str, ...]] = {
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": (
        "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc",
        "brier_score", "likelihood",
    ),
    "generate_until": (),
}  # fmt: skip
FUNCTIONS = ("process_docs", "process_results", "custom_dataset")
MAPPINGS = ("dataset_kwargs", "generation_kwargs", "fewshot_config")
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
TEXTS = (
    *SPLITS, "dataset_path", "dataset_name", "description", "gen_prefix", "target_delimiter",
    "fewshot_delimiter",
)  # fmt: skip
TEMPLATES = ("description", "doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix")
# What `dataset_path` may name beside the hub: formats whose files hold no code.
FORMATS = ("json", "csv", "parquet", "arrow", "text", "xml")
DEFAULT_SPLIT = "train"  # of data files without the name of a split


def find_definition_problems(
    name: str, used: list[Definition], leaves: list[Leaf], evaluation: EvaluationConfig
) -> Iterator[str]:
    """Yield what is wrong with a task or group and the tasks in it, one line each.

    Args:
        name: of the task or group.
        used: its definition and those of what it contains.
        leaves: its tasks.
        evaluation: whether code is trusted, and which files take the place of data sets.
    """
    trusted = evaluation.trust_task_code
    if not trusted:
        code = list(find_code_problems(used))
        yield from code
        if code:
            return
    for group in (one for one in used if one.is_group):
        yield from _find_group_problems(group)
    is_replaced = bool(evaluation.data_files.get(name))
    for leaf in leaves:
        if "class" in leaf.config:
            continue
        faults = list(_find_faults(leaf.config, is_replaced=is_replaced, trusted=trusted))
        if not is_replaced:
            faults += _find_missing_files(leaf)
        yield from (f"{leaf.path}: {leaf.name}: {fault}" for fault in faults)


def _find_group_problems(group: Definition) -> Iterator[str]:
    members = group.config.get("task")
    if not isinstance(members, list) or not members:
        yield f"{group.path}: {group.name}: task is {members!r}; a group's is a list of tasks"
    listed = group.config.get("aggregate_metric_list") or []
    for one in listed if isinstance(listed, list) else [listed]:
        known = ("metric", "filter_list", "aggregation", "weight_by_size")
        if not isinstance(one, Mapping) or "metric" not in one:
            yield f"{group.path}: {group.name}: aggregate_metric_list: {one!r} names no metric"
            continue
        for key in set(one) - set(known):
            yield (
                f"{group.path}: {group.name}: aggregate_metric_list: {key} is not a key; "
                f"{nearest(key, known)}"
            )


def find_unaggregated(group: Group, tasks: Iterable[Task]) -> Iterator[str]:
    """Yield the metrics of a group's score that none of its tasks has, by the same filter."""
    has: dict[str, set[str]] = {}
    for task in tasks:
        for metric in task.aggregation():
            has.setdefault(metric, set()).update(one.name for one in task._filters)
    for one in group.aggregate_metric_list or []:
        key = f"aggregate_metric_list: {one.metric}"
        if one.metric not in has:
            yield f"{key}: no task has this metric; {nearest(one.metric, tuple(has))}"
            continue
        filters = tuple(sorted(has[one.metric]))
        for name in one.filter_list or []:
            if name not in filters:
                yield f"{key}: no task has it by the filter {name}; {nearest(name, filters)}"


def _find_faults(config: Mapping[str, Any], *, is_replaced: bool, trusted: bool) -> Iterator[str]:
    """Yield what is wrong with one task's settings."""
    for key in config:
        if key not in KEYS:
            yield f"{key} is not a key of an lm-eval task; {_closest(key, KEYS)}"
    output = config.get("output_type", "generate_until")
    if output not in tuple(COMPUTED):
        yield f"output_type is {output}; {nearest(output, tuple(COMPUTED))}"
        return
    yield from _find_kind_faults(config)
    yield from _find_missing(config, output, is_replaced=is_replaced)
    if config.get("use_prompt") is not None and not trusted:
        yield f"use_prompt takes prompts from elsewhere, which is only read with {TRUST}=true"
    yield from _find_metric_faults(config, output)
    yield from _find_filter_faults(config)
    if not is_replaced:
        yield from _find_data_faults(config, trusted=trusted)


def _find_kind_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield values of another kind than lm-eval takes, and templates that are broken."""
    for key in FUNCTIONS:
        if key in config and not _is_function(config[key]):
            yield f"{key} is {config[key]!r}; it is written as !function FILE.NAME"
    for key in MAPPINGS:
        if not isinstance(config.get(key), Mapping | None):
            yield f"{key} is {config[key]!r}; it must be a mapping of KEY: VALUE lines"
    for key in TEXTS:
        if not isinstance(config.get(key), str | None):
            yield f"{key} is {config[key]!r}; it must be text"
    shots = config.get("num_fewshot")
    if shots is not None and (not isinstance(shots, int) or shots < 0):
        yield f"num_fewshot is {shots!r}; it must be a number of examples"
    for key in TEMPLATES:
        try:
            lm_eval.utils.env.parse(value) if isinstance(value := config.get(key), str) else None
        except TemplateSyntaxError as error:
            yield f"{key}: its template is broken: {first_line(error)}"


def _find_missing(config: Mapping[str, Any], output: str, *, is_replaced: bool) -> Iterator[str]:
    prompted = config.get("use_prompt") is not None
    for key in REQUIRED:
        replaced = is_replaced or config.get("custom_dataset") is not None
        if config.get(key) is None and not (replaced if key == "dataset_path" else prompted):
            yield f"{key} is missing"
    if config.get("test_split") is None and config.get("validation_split") is None:
        yield "test_split is missing, or validation_split: the questions that are asked"
    if output == "multiple_choice" and config.get("doc_to_choice") is None and not prompted:
        yield "doc_to_choice is missing, which output_type: multiple_choice needs"


def _find_metric_faults(config: Mapping[str, Any], output: str) -> Iterator[str]:
    """Yield metrics that lm-eval lacks, or does not compute for this type of output."""
    listed = config.get("metric_list")
    if listed is None:
        return
    if not isinstance(listed, list) or not all(
        isinstance(one, Mapping) and isinstance(one.get("metric"), str) for one in listed
    ):
        yield "metric_list must be a list of mappings, such as - metric: acc"
        return
    scores_itself = config.get("process_results") is not None
    for one in listed:
        name, by = one["metric"], one.get("aggregation")
        computed = COMPUTED[output] or tuple(metric_registry)
        if one.get("hf_evaluate"):
            yield (
                f"metric_list: {name}: hf_evaluate runs code of the hub, which is not supported; "
                f"use one of lm-eval's: {', '.join(metric_registry)}"
            )
        elif not scores_itself and not _is_function(name) and name not in computed:
            what = f"is not a metric that output_type: {output} has"
            yield f"metric_list: {name} {what}; {nearest(name, computed)}"
        elif by is None and name not in metric_registry and not _is_function(name):
            yield f"metric_list: {name} needs aggregation: mean, say, and higher_is_better"
        known = tuple(aggregation_registry)
        if by is not None and not _is_function(by) and by not in known:
            yield f"metric_list: {name}: aggregation is {by}; {nearest(by, known)}"


def _is_function(value: Any) -> bool:
    return isinstance(value, Function)


def _find_filter_faults(config: Mapping[str, Any]) -> Iterator[str]:
    listed = config.get("filter_list") or []
    for one in listed if isinstance(listed, list) else [listed]:
        steps = one.get("filter") if isinstance(one, Mapping) else None
        if not isinstance(steps, list) or "name" not in one:
            yield "filter_list must be a list of mappings, each with a name and a list filter"
            return
        for step in steps:
            name = step.get("function") if isinstance(step, Mapping) else step
            if not isinstance(name, str) or (
                not _is_function(name) and name not in filter_registry
            ):
                yield f"filter_list: function is {name}; {nearest(name, tuple(filter_registry))}"


def _find_data_faults(config: Mapping[str, Any], *, trusted: bool) -> Iterator[str]:
    """Yield data files that are not there, and splits that no file is named for."""
    import datasets.packaged_modules as packaged

    source = str(config.get("dataset_path"))
    if source in packaged._PACKAGED_DATASETS_MODULES and source not in FORMATS and not trusted:
        yield f"dataset_path is {source}; local files may be {', '.join(FORMATS)}"
    if source.startswith((".", "/", "~")) and not Path(source).exists():
        yield f"dataset_path: there is no {source}"
    kwargs = config.get("dataset_kwargs")
    named = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    if source not in FORMATS or named is None:
        return
    splits = list(named) if isinstance(named, Mapping) else [DEFAULT_SPLIT]
    for key in SPLITS:
        split = config.get(key)
        if split is not None and split not in splits:
            yield (
                f"{key} is {split}, but dataset_kwargs names data_files for {', '.join(splits)}; "
                f"write data_files: {{{split}: FILE}}"
            )


def _find_missing_files(leaf: Leaf) -> Iterator[str]:
    """Yield data files that are not there, with the one beside the YAML file if it is meant."""
    for file in find_local_files(leaf.config):
        if glob.glob(file, recursive=True):
            continue
        beside = leaf.path.parent / file if leaf.path else Path(file)
        remedy = f"write {beside}" if glob.glob(str(beside), recursive=True) else "correct it"
        yield (
            f"dataset_kwargs: there is no file {file}, which lm-eval looks for in the folder that "
            f"the command runs in, {Path.cwd()}; {remedy}"
        )


def _closest(key: str, known: tuple[str, ...]) -> str:
    """Return the remedy for an unknown key of many: the closest one, not all of them."""
    close = nearest(key, known).partition("Known:")[0]
    return close.strip() or "leave it out"


_ = lm_eval.filters  # registers them
