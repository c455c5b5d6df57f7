"""The validation losses of a training: which step's adapter is kept, and when to stop early."""

from __future__ import annotations


class Validations:
    """One training's validation losses by step, and the decisions of `training.early_stopping`.

    All is derived from the losses, so that a resume needs nothing else.
    """

    def __init__(self, patience: int | None) -> None:
        self.losses: dict[int, float] = {}
        self._patience = patience  # None keeps the last adapter and never stops

    @property
    def best_step(self) -> int | None:
        """Return the first step of the lowest loss; None where the last adapter is kept."""
        if self._patience is None or not self.losses:
            return None
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def kept_loss(self) -> float | None:
        """Return the loss of the adapter that is kept."""
        if self.best_step is not None:
            return self.losses[self.best_step]
        return list(self.losses.values())[-1] if self.losses else None

    @property
    def stops(self) -> bool:
        """Return whether the loss has not fallen for `training.early_stopping` validations."""
        if self.best_step is None or self._patience is None:
            return False
        return sum(step > self.best_step for step in self.losses) >= self._patience

    def verdict(self, step: int, num_steps: int) -> str:
        """Say why the adapter of an earlier step is kept at the end of a training."""
        if step < num_steps:
            return (
                f"stopped early at step {step} of {num_steps}: validation loss has not fallen for "
                f"{self._patience} validations; the adapter of step {self.best_step} is kept"
            )
        return f"the adapter of step {self.best_step} is kept: its validation loss is the lowest"
