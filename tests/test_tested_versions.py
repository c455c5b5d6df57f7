"""Releases of libraries that were not tested are used, with one warning."""

from __future__ import annotations

import logging
import re
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from finetune.pipeline import tested_versions
from finetune.pipeline.session import Session
from finetune.pipeline.tested_versions import TESTED, describe_untested

ROOT = Path(__file__).parents[1]


def test_the_pinned_set_is_a_tested_one() -> None:
    """What constraints.txt pins lies in the tested ranges, and is what this environment has."""
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    for name, (oldest, newest) in TESTED.items():
        assert Version(oldest) <= Version(pinned[name]) <= Version(newest), name


def test_the_lower_bounds_are_the_oldest_tested_releases() -> None:
    """And no dependency has an upper bound without a reason beside it."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    given = tomllib.loads("\n".join(lines))["project"]["dependencies"]
    bounds = dict(re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", one).groups() for one in given)  # type: ignore[union-attr, misc]
    for name, (oldest, _) in TESTED.items():
        assert Version(bounds[name]) == Version(oldest), name
    bounded = [line for line in lines if re.match(r'\s+"[\w\[\]-]+>=[^"]*,<', line)]
    assert all("#" in line for line in bounded)


@pytest.mark.parametrize(
    ("installed", "is_tested"),
    [("2.11.0", True), ("2.13.0+cpu", True), ("2.15.3", True), ("2.16.0", False), ("2.9", False)],
)
def test_a_release_outside_the_range_is_named_with_it(
    monkeypatch: pytest.MonkeyPatch, installed: str, is_tested: bool
) -> None:
    """A later patch of the newest counts as tested; a build's label does not matter."""
    monkeypatch.setattr(tested_versions, "TESTED", {"torch": ("2.11.0", "2.15.0")})
    monkeypatch.setattr(tested_versions, "version", lambda _: installed)
    said = describe_untested()
    assert (said is None) == is_tested
    if said is not None:
        assert f"torch {installed} (tested: 2.11.0 to 2.15.0)" in said


def test_a_session_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """However many runs it checks."""
    session = Session()
    with caplog.at_level(logging.WARNING, "finetune"):
        for _ in range(3):
            session.warn_once(lambda: None)
            session.warn_once(describe_nothing)
    assert [record.message for record in caplog.records] == ["nothing is wrong"]


def describe_nothing() -> str | None:
    return "nothing is wrong"
