"""Values: as the standard library's dataclasses, whose generated methods they share instead."""

import copy
import dataclasses
import pickle
from dataclasses import field
from typing import Any

import pytest

from modelhostd.core.values import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """A value with everything that a field can say."""

    x: int
    y: int = 0
    note: str = field(default="", compare=False)
    secret: str = field(default="", repr=False)
    more: list[Any] = field(default_factory=list, compare=False)


@dataclass(frozen=True, slots=True)
class Other:
    """Another value of one field, as the values of one field compare by it alone."""

    x: int


@dataclass(frozen=True, slots=True)
class Empty:
    """A value without fields."""


@dataclass(slots=True)
class Counter:
    """What changes."""

    count: int = 0


@dataclass(eq=False)
class Thing:
    """What is itself alone."""

    name: str


@dataclass(frozen=True, slots=True)
class OfItsOwn:  # noqa: PLW1641 - it gets one
    """A value that says itself what is equal."""

    x: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OfItsOwn)

    def __repr__(self) -> str:
        return "its own"


def test_values_are_equal_by_the_fields_that_compare():
    """Fields decide, those that do not compare are left out, and another class is never equal."""
    assert Point(1, 2) == Point(1, 2, note="different")
    assert Point(1, 2) != Point(1, 3)
    assert Other(1) == Other(1) != Other(2)
    assert Other(1) != Point(1)
    assert (Other(1) == 1) is False
    assert Empty() == Empty()


def test_equal_values_have_one_hash_and_what_changes_has_none():
    """Values are keys; what compares by what may change is none, and what is itself alone is one."""
    assert {Point(1): "a"}[Point(1, note="different")] == "a"
    assert len({Other(1), Other(1), Empty(), Empty()}) == 2
    with pytest.raises(TypeError):
        hash(Counter())
    assert Counter(1) == Counter(1)
    assert Thing("a") != Thing("a")
    assert hash(Thing("a"))


def test_a_frozen_value_refuses_changes():
    """Neither a field nor anything else can be set or deleted."""
    point = Point(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del point.x
    assert not hasattr(point, "__dict__")


def test_a_value_shows_its_fields():
    """As the standard one does, without those that are not to be shown, and even where it holds itself."""
    point = Point(1, secret="hidden")
    assert repr(point) == "Point(x=1, y=0, note='', more=[])"
    point.more.append(point)
    assert repr(point) == "Point(x=1, y=0, note='', more=[...])"


def test_a_class_keeps_what_it_says_itself():
    """Its own comparison and text stay, and it has a hash still where it is frozen."""
    assert OfItsOwn(1) == OfItsOwn(2)
    assert repr(OfItsOwn(1)) == "its own"
    assert hash(OfItsOwn(1)) == hash(OfItsOwn(1))


def test_the_standard_tools_know_it():
    """``replace``, ``asdict``, ``copy`` and ``pickle`` work on it."""
    point = Point(1, 2)
    assert dataclasses.replace(point, x=3) == Point(3, 2)
    assert dataclasses.asdict(Other(4)) == {"x": 4}
    assert copy.deepcopy(point) == pickle.loads(pickle.dumps(point)) == point
