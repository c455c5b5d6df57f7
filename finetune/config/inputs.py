"""The resolved inputs of a run: model, data and identity, attached to its job by planning.

Plain values that any process can read: nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from finetune.config.schema import VALIDATION_PATH, ModelConfig, SourceConfig


@dataclass(frozen=True)
class Source:
    """The location of a base model: a local folder, or a hub id at one commit."""

    location: str
    digest: str  # of the weights: a commit of the hub, or a sha256 of their content
    revision: str | None = None

    @property
    def is_pinned(self) -> bool:
        """True at a commit of the hub, which never changes."""
        return self.revision is not None


@dataclass(frozen=True)
class DataSource:
    """The location of rows; `digest` is of their content, `key` the setting that names them."""

    key: str
    location: str
    digest: str
    settings: SourceConfig
    revision: str | None = None  # commit of a hub data set; None for a file

    @property
    def is_validation(self) -> bool:
        """True for rows of `data.validation_path`, which are not trained on."""
        return self.key == VALIDATION_PATH

    def __str__(self) -> str:
        return f"{self.key}={self.settings.path}"


@dataclass(frozen=True)
class Inputs:
    """All that a run is computed from, and its identity; resolved once, by planning."""

    device: str
    source: Source
    data: list[DataSource]
    model: ModelConfig  # with the quantisation of the checkpoint, if it has one
    identity: str  # of the training
    folder: Path  # of the run
    files: dict[str, str] = field(default_factory=dict)  # setting -> sha256 of the file it names
    job: str = ""  # a digest of settings and inputs, the same on every machine
    dtype: str = ""  # that the base computes in on this kind of device: fp32, bf16 or fp16
