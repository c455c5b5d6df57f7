"""The inputs of a run as planning found them: model, data and identity, which travel with its job.

Plain values that any process can read: nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from finetune.config.schema import VALIDATION_PATH, ModelConfig, SourceConfig


@dataclass(frozen=True)
class Source:
    """Where a base model is: a local folder or a hub id at one commit."""

    location: str
    digest: str  # what the weights are: a commit of the hub, or a digest of their content
    revision: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether it is at a commit of the hub, which never changes."""
        return self.revision is not None


@dataclass(frozen=True)
class DataSource:
    """Where the rows are; `digest` stands for their content, `key` is the setting naming them."""

    key: str
    location: str
    digest: str
    settings: SourceConfig
    revision: str | None = None  # commit of a hub data set; None for a file

    @property
    def is_validation(self) -> bool:
        """Whether its rows are only validated on."""
        return self.key == VALIDATION_PATH

    def __str__(self) -> str:
        return f"{self.key}={self.settings.path}"


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, and the name that follows from it; found once, by planning."""

    device: str
    source: Source
    data: list[DataSource]
    model: ModelConfig  # with the quantisation that the checkpoint brings, where it does
    identity: str  # of the training
    folder: Path  # of the run
    files: dict[str, str] = field(default_factory=dict)  # setting -> sha256 of the file it names
