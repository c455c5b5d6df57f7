"""Load a champion from MLflow: `mlflow.pyfunc.load_model("models:/SWEEP@champion")` generates.

The model's folder is a run's adapter or model as MLflow has it, with the run's settings below
`run/`; `finetune.tracking.champion` writes them. MLflow calls `_load_pyfunc`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from finetune.config.methods import METHODS
from finetune.data.turns import Turn, Unusable
from finetune.inference.conversation import Sampling, build_voices, load_to_generate
from finetune.inference.trained import Trained, find_trained
from finetune.models import base_model
from finetune.problems import Refused
from finetune.tracking.run_folder import RunFolder

DEFAULTS = {"max_new_tokens": 256, "temperature": 0.0}
SETTINGS = "run"  # the folder of the run's settings below a model's


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Generator:
    """Load a model from its folder; the name and the arguments are MLflow's.

    Args:
        path: of the folder.
        model_config: `trust_remote_code` allows the Python code of the base model.

    Raises:
        Refused: the base is missing, or the settings would run code.
    """
    trusts = bool((model_config or {}).get("trust_remote_code", False))
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        shutil.copytree(Path(path) / SETTINGS, run)
        is_full = METHODS[RunFolder(run).read_config().peft.method].trains_base
        (run / ("model" if is_full else "adapter")).symlink_to(Path(path).resolve())
        return Generator(find_trained(run, trusts_remote_code=trusts))


def _rows_of(record: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """Return the rows of a record: MLflow makes one of a mapping of columns to lists.

    Raises:
        Refused: the lists have unequal lengths.
    """
    columns = {key: value for key, value in record.items() if isinstance(value, list)}
    if not columns:
        return [record]
    if len({len(values) for values in columns.values()}) > 1:
        raise Refused([f"the columns {', '.join(map(str, columns))} have unequal lengths"])
    rows = zip(*columns.values(), strict=True)
    return [{**record, **dict(zip(columns, row, strict=True))} for row in rows]


class Generator:
    """A trained model, prompted as in training."""

    def __init__(self, run: Trained) -> None:
        self.model, self.tokenizer = load_to_generate(run, is_merged=False)
        (self._voice,) = build_voices([run])

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return an answer for each row of a pandas frame, whose columns are the prompt's fields.

        Args:
            model_input: the frame; a template of one field takes one column of any name.
            params: `max_new_tokens`, and `temperature`, of which 0 takes the likeliest token.

        Raises:
            Refused: a field is missing, or a prompt is too long.
        """
        sampling = Sampling(**{**DEFAULTS, **(params or {})})
        rows = (row for record in model_input.to_dict("records") for row in _rows_of(record))
        return [self._answer(row, sampling) for row in rows]

    def _answer(self, row: Mapping[Any, Any], sampling: Sampling) -> str:
        fields = {str(key): value for key, value in row.items() if isinstance(value, str)}
        needed = self._voice.fields
        if len(needed) == len(fields) == 1:
            fields = dict(zip(needed, fields.values(), strict=True))
        if missing := [name for name in needed if name not in fields]:
            raise Refused(
                [f"the prompt has the fields {', '.join(needed)}; {missing[0]} is missing"]
            )
        try:
            asked = [*self._voice.turns(fields), Turn("assistant", "")]
            tokens = self._voice.template.ask(asked, self.tokenizer).tokens
        except Unusable as fault:
            raise Refused([f"the prompt cannot be made: {fault}"]) from None
        return self._generate(tokens, sampling)

    def _generate(self, tokens: list[int], sampling: Sampling) -> str:
        longest = base_model.max_positions(self.model.config)
        room = sampling.max_new_tokens
        if longest is not None:
            room = min(room, longest - len(tokens))
        if room < 1:
            raise Refused([f"the prompt of {len(tokens)} tokens fills the model's {longest}"])
        drawn = {"temperature": sampling.temperature} if sampling.temperature else {}
        asked = torch.tensor([tokens], device=self.model.device)
        with torch.inference_mode():
            found = cast(Any, self.model).generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=room,
                do_sample=bool(drawn), **drawn,
            )  # fmt: skip
        said = self.tokenizer.decode(found[0, len(tokens) :], skip_special_tokens=True)
        return str(said).strip()
