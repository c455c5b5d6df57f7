"""The releases that this one was tested with, by `make test-oldest` and `make test-newest`."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

# The oldest and the newest release of each; a later patch release of the newest counts as tested.
TESTED = {
    "torch": ("2.11.0", "2.15.0"),
    "transformers": ("5.17.0", "5.24.0"),
    "peft": ("0.21.2", "0.21.2"),
    "trl": ("1.16.0", "1.16.0"),
    "accelerate": ("1.15.0", "1.15.0"),
    "bitsandbytes": ("0.50.2", "0.50.2"),
    "datasets": ("5.2.0", "5.2.0"),
    "lm_eval": ("0.4.13", "0.4.13"),
    "mlflow": ("3.17.2", "3.17.2"),
    "hydra-core": ("1.3.8", "1.3.8"),
}


def describe_untested() -> str | None:
    """Return a warning of installed releases that were not tested; None where all were."""
    found = []
    for name, (oldest, newest) in TESTED.items():
        installed = version(name)
        if not Version(oldest) <= Version(installed) or _minor(installed) > _minor(newest):
            found.append(f"{name} {installed} (tested: {oldest} to {newest})")
    if not found:
        return None
    return f"not tested with finetune {version('finetune')}: {', '.join(found)}"


def _minor(release: str) -> tuple[int, ...]:
    return Version(release).release[:2]
