"""What is put in a library's place is taken back, whatever happens meanwhile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from finetune.substitution import substituted, updated


class Library:
    """Has a method of its class, which its objects share."""

    def name(self) -> str:
        return "library"


def test_an_attribute_is_put_back_after_an_error() -> None:
    """One of a module, which others go on using."""
    module = SimpleNamespace(size=1)

    def fail() -> None:
        assert module.size == 2
        raise KeyError

    with pytest.raises(KeyError), substituted(module, "size", 2):
        fail()
    assert module.size == 1


def test_a_method_is_substituted_on_one_object() -> None:
    """Afterwards it is the class's again, and none of the object's own."""
    one, other = Library(), Library()
    with substituted(one, "name", lambda: "substitute"):
        assert [one.name(), other.name()] == ["substitute", "library"]
    assert one.name() == "library"
    assert vars(one) == {}


def test_an_attribute_that_is_not_there_is_not_substituted() -> None:
    """A library that no longer has it is noticed, not given one that it never reads."""
    with pytest.raises(AttributeError), substituted(SimpleNamespace(), "size", 2):
        pass


def test_a_mapping_is_as_before() -> None:
    """Replaced entries are back, added ones gone, in the same object."""
    entries = {"a": 1, "b": 2}
    with updated(entries, {"b": 3, "c": 4}):
        assert entries == {"a": 1, "b": 3, "c": 4}
    assert entries == {"a": 1, "b": 2}
