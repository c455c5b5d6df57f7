"""Local files in place of a stock task's data set; its definition stays lm-eval's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.tasks._index import Entry
from lm_eval.tasks._yaml_loader import load_yaml

from finetune.config.schema import EvaluationConfig
from finetune.data.sources import Row, read_file
from finetune.evaluation.task_index import members_of
from finetune.files import known_digest


def local_entries(
    name: str, index: Mapping[str, Entry], evaluation: EvaluationConfig
) -> dict[str, Entry]:
    """Return the stock definitions of a task, or of a group's, that read local files instead.

    Raises:
        ValueError: a split that is needed has no file, or the tasks are not defined by files.
    """
    files, key = evaluation.data_files.get(name), f"evaluation.data_files.{name}"
    if not files:
        return {}
    try:
        members = members_of(name, index)
    except KeyError as missing:
        raise ValueError(f"{key}: it contains {missing}, which is not a task; name tasks") from None
    local, source = {}, LocalSource()
    for member in members:
        path, own = index[member].yaml_path, index[member].cfg
        stock = load_yaml(path) if path else dict(own or {})
        config = _local_config(stock, files, evaluation.num_fewshot, key)
        subject = None if member == name else stock.get("dataset_name") or member
        config["dataset_kwargs"] = {"files": dict(files), "key": key, "subject": subject}
        config["custom_dataset"] = source
        local[member] = replace(index[member], yaml_path=None, cfg=config)
    return local


def _local_config(
    stock: Mapping[str, Any], files: Mapping[str, str], num_fewshot: int | None, key: str
) -> dict[str, Any]:
    """Return a stock definition with only the source of its documents replaced.

    Raises:
        ValueError: it needs a split that has no file.
    """
    config = dict(stock)
    asked = config.get("test_split") or config.get("validation_split")
    if asked is None:
        raise ValueError(f"{key}: {config['task']} is defined by code, which reads no local files")
    fewshot = {"split": config.get("fewshot_split"), **(config.get("fewshot_config") or {})}
    own = config.get("num_fewshot")
    shots = own if own == 0 or num_fewshot is None else num_fewshot
    if asked not in files:
        raise ValueError(f"{key}: {config['task']} asks its {asked} split; add +{key}.{asked}=FILE")
    training = config.get("training_split") or config.get("validation_split") or asked
    solved = fewshot["split"] or (asked if fewshot.get("samples") else training)
    if shots and solved not in files:
        raise ValueError(
            f"{key}: {config['task']} takes its {shots} solved examples from its {solved} split; "
            f"add +{key}.{solved}=FILE, or set evaluation.num_fewshot=0"
        )
    for name in ("dataset_path", "dataset_name"):
        config.pop(name, None)
    for name in ("training_split", "validation_split", "test_split"):
        if config.get(name) not in files:
            config[name] = None
    if fewshot["split"] and fewshot["split"] not in files:
        config["fewshot_config"] = {**fewshot, "split": asked}  # from which none is drawn
    return config


class LocalSource:
    """Read local files in place of the hub's, each once for all tasks of a group."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, list[Row]]] = {}  # by file and subject

    def __call__(self, files: Mapping[str, str], key: str, subject: str | None, **_: Any) -> Any:
        """Read split -> file into what lm-eval expects of `datasets.load_dataset`.

        Args:
            files: a split's rows, in the columns of the hub's data set.
            key: the setting that names them, for errors.
            subject: take only its rows; None takes all.
        """
        import datasets

        splits = {}
        for split, file in files.items():
            rows = self._of_subject(file, subject) if subject else read_file(Path(file), name=file)
            if rows is None:
                raise ValueError(
                    f"{key}.{split}={file} has no row whose column `subject` is {subject!r}; "
                    "a group's file has rows for each of its tasks"
                )
            splits[split] = datasets.Dataset.from_list([dict(row) for row in rows])
        return datasets.DatasetDict(splits)

    def _of_subject(self, file: str, subject: str) -> list[Row] | None:
        if file not in self._rows:
            rows: dict[str, list[Row]] = defaultdict(list)
            for row in read_file(Path(file), name=file):
                rows[row.get("subject", "")].append(row)
            self._rows[file] = dict(rows)
        return self._rows[file].get(subject)


def find_file_digests(evaluation: EvaluationConfig, name: str) -> list[str]:
    """Return the digests of the files that take the place of a task's data set."""
    files = [Path(file) for file in evaluation.data_files.get(name, {}).values()]
    return [known_digest(path) for path in files if path.is_file()]
