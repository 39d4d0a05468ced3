"""The states of artifacts, instances and operations: one transition table each.

A transition that is not in its table is a bug in modelhost, never a caller's fault: it asserts.
"""

from collections.abc import Mapping
from typing import TypeVar

from modelhostd.core.resources import ArtifactState as A
from modelhostd.core.resources import InstanceState as I
from modelhostd.core.resources import OperationState as O

ARTIFACT: Mapping[A, frozenset[A]] = {
    A.ABSENT: frozenset({A.QUEUED}),
    A.QUEUED: frozenset({A.DOWNLOADING, A.PAUSED, A.FAILED, A.ABSENT}),
    A.DOWNLOADING: frozenset({A.VERIFYING, A.PAUSED, A.FAILED, A.QUEUED, A.QUARANTINED, A.ABSENT}),
    A.VERIFYING: frozenset({A.AVAILABLE, A.FAILED, A.QUARANTINED, A.PAUSED, A.QUEUED, A.ABSENT}),
    A.AVAILABLE: frozenset({A.QUARANTINED, A.ABSENT, A.FAILED}),
    A.PAUSED: frozenset({A.QUEUED, A.ABSENT}),
    A.FAILED: frozenset({A.QUEUED, A.ABSENT}),
    A.QUARANTINED: frozenset({A.QUEUED, A.AVAILABLE, A.ABSENT}),
}

INSTANCE: Mapping[I, frozenset[I]] = {
    I.QUEUED: frozenset({I.LOADING, I.FAILED, I.BLOCKED}),
    # Back to WARM: a swap-in that was stopped, or found no memory.
    I.LOADING: frozenset({I.READY, I.WARM, I.QUEUED, I.DRAINING, I.FAILED, I.BLOCKED}),
    # WARM: its worker has gone, and its weights are still in host memory.
    I.READY: frozenset({I.DRAINING, I.WARM, I.QUEUED, I.BLOCKED, I.FAILED}),
    # A drained instance that gets its worker killed comes back, as any other.
    I.DRAINING: frozenset({I.WARM, I.QUEUED, I.BLOCKED, I.FAILED}),
    # DRAINING: the copy in host memory goes, too.
    I.WARM: frozenset({I.LOADING, I.DRAINING, I.QUEUED}),
    I.FAILED: frozenset({I.QUEUED}),
    I.BLOCKED: frozenset({I.QUEUED}),
}

OPERATION: Mapping[O, frozenset[O]] = {
    O.QUEUED: frozenset({O.RUNNING, O.PAUSED, O.SUCCEEDED, O.FAILED, O.CANCELLED}),
    O.RUNNING: frozenset({O.QUEUED, O.PAUSED, O.SUCCEEDED, O.FAILED, O.CANCELLED}),
    O.PAUSED: frozenset({O.QUEUED, O.CANCELLED, O.FAILED}),
    O.SUCCEEDED: frozenset(),
    O.FAILED: frozenset(),
    O.CANCELLED: frozenset(),
}

S = TypeVar("S", A, I, O)


def step(table: Mapping[S, frozenset[S]], old: S, new: S) -> S:
    """Return ``new`` after asserting that it may follow ``old``; staying is always allowed."""
    assert new == old or new in table[old], f"illegal transition {old} -> {new}"
    return new
