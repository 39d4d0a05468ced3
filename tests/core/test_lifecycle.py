"""The transition tables: what may follow what, and that every state can be left or is final."""

import enum
from collections.abc import Mapping

import pytest

from modelhostd.core.lifecycle import ARTIFACT, INSTANCE, OPERATION, step
from modelhostd.core.resources import (
    FINAL_STATES,
    ArtifactState,
    InstanceState,
    OperationState,
)

Table = Mapping[enum.StrEnum, frozenset[enum.StrEnum]]
TABLES = [(ArtifactState, ARTIFACT), (InstanceState, INSTANCE), (OperationState, OPERATION)]


def reachable(table: Table, start: enum.StrEnum) -> set[enum.StrEnum]:
    found, new = {start}, [start]
    while new:
        for state in table[new.pop()] - found:
            found.add(state)
            new.append(state)
    return found


@pytest.mark.parametrize(("states", "table"), TABLES, ids=["artifact", "instance", "operation"])
def test_each_state_stands_in_its_table(states: type[enum.StrEnum], table: Table) -> None:
    """Every state has its line, and a state never lists itself: staying is always allowed."""
    assert set(table) == set(states)
    for state, following in table.items():
        assert following <= set(states)
        assert state not in following
        assert step(table, state, state) is state


@pytest.mark.parametrize(("states", "table"), TABLES, ids=["artifact", "instance", "operation"])
def test_every_pair_of_states(states: type[enum.StrEnum], table: Table) -> None:
    """A step in the table is taken, any other is a bug and asserts."""
    for old in states:
        for new in states:
            if new == old or new in table[old]:
                assert step(table, old, new) is new
            else:
                with pytest.raises(AssertionError, match=f"{old} -> {new}"):
                    step(table, old, new)


def test_no_artifact_is_stuck() -> None:
    """From every state an artifact can become AVAILABLE, and can be taken away."""
    for state in ArtifactState:
        assert {ArtifactState.AVAILABLE, ArtifactState.ABSENT} <= reachable(ARTIFACT, state)


def test_no_instance_is_stuck() -> None:
    """From every state an instance can become READY again; READY comes after LOADING only."""
    for state in InstanceState:
        assert InstanceState.READY in reachable(INSTANCE, state)
        assert (InstanceState.READY in INSTANCE[state]) == (state is InstanceState.LOADING)


def test_every_operation_ends_once() -> None:
    """From every state an operation can end in each way it may, and what has ended stays so."""
    for state in OperationState:
        if state in FINAL_STATES:
            assert not OPERATION[state]
        else:
            assert reachable(OPERATION, state) >= FINAL_STATES
