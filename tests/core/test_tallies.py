"""Counting what happened from events alone."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest

from modelhostd.core.resources import (
    Event,
    Instance,
    InstanceState,
    Kind,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
    Resource,
    Source,
    StoredError,
    Tier,
)
from modelhostd.core.tallies import UNKNOWN, Tallies, running_downloads

MODEL = Model("minilm", "u", Source("hf://org/MiniLM"), 0.0, 0.0)
INSTANCE = Instance("minilm", "1", 1, "cpu", InstanceState.LOADING, Tier.DISK)
DOWNLOAD = Operation("d1", OperationKind.DOWNLOAD, OperationState.QUEUED, 0.0, model="minilm")

_numbers: Iterator[int] = count(1)


def event(kind: Kind, key: str, resource: Resource | None, reason: str = "") -> Event:
    """Return an event as the registry publishes it."""
    return Event(next(_numbers), 0.0, kind, key, resource, reason)


def instance(state: InstanceState, reason: str, **changes: object) -> Event:
    """Return an event of the instance."""
    changed = replace(INSTANCE, state=state, **changes)  # type: ignore[arg-type]
    return event(Kind.INSTANCE, f"{changed.model}/1", changed, reason)


def gone(reason: str) -> Event:
    """Return the event of the instance's end."""
    return event(Kind.INSTANCE, "minilm/1", None, reason)


def download(state: OperationState, done: int = 0, reused: int = 0, **changes: object) -> Event:
    """Return an event of the download with the progress that it carries."""
    phase = changes.pop("phase", Phase.DOWNLOADING)
    progress = Progress(phase=phase, done_bytes=done, reused_bytes=reused)  # type: ignore[arg-type]
    changed = replace(DOWNLOAD, state=state, progress=progress, **changes)  # type: ignore[arg-type]
    return event(Kind.OPERATION, changed.id, changed)


@pytest.fixture
def tallies() -> Tallies:
    """Tallies that know one model."""
    return Tallies([MODEL])


# --- evictions and loads --------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["EVICTED", "EVICTED_WHEN_IDLE", "OVER_BUDGET", "KEEP_ALIVE"])
def test_an_eviction_is_counted_once(tallies: Tallies, reason: str) -> None:
    """DRAINING for one of the four reasons counts; that the instance is gone afterwards does not."""
    tallies.fold([instance(InstanceState.DRAINING, reason), gone(reason)])
    assert tallies.evictions == {("minilm", reason): 1}


def test_what_was_asked_for_is_no_eviction(tallies: Tallies) -> None:
    """An unload and a crash are not evictions."""
    tallies.fold([instance(InstanceState.DRAINING, "UNLOADED"), gone("UNLOADED"), gone("CRASHED")])
    assert not tallies.evictions


def test_loads_are_counted_by_how_they_ended(tallies: Tallies) -> None:
    """READY, LOAD_FAILED and a cancellation are one load each; QUEUED and LOADING are none."""
    tallies.fold(
        [
            instance(InstanceState.QUEUED, "QUEUED"),
            instance(InstanceState.LOADING, "LOADING"),
            instance(InstanceState.READY, "READY", load_s=0.3),
            instance(InstanceState.FAILED, "LOAD_FAILED"),
            instance(InstanceState.BLOCKED, "LOAD_FAILED"),
            gone("CANCELLED"),
        ]
    )
    assert tallies.loads == {
        ("minilm", "ready"): 1,
        ("minilm", "failed"): 2,
        ("minilm", "cancelled"): 1,
    }
    seconds = tallies.load_seconds["minilm"]
    assert (seconds.count, seconds.total) == (1, 0.3)


# --- downloads ------------------------------------------------------------------------------------


def test_only_what_the_source_sent_is_counted(tallies: Tallies) -> None:
    """Bytes that were there from before are not, however often they are told."""
    tallies.fold([download(OperationState.RUNNING, phase=Phase.PLANNING)])
    running = replace(DOWNLOAD, state=OperationState.RUNNING)
    tallies.sample(running, Progress(Phase.DOWNLOADING, done_bytes=50, reused_bytes=40))
    tallies.sample(running, Progress(Phase.DOWNLOADING, done_bytes=50, reused_bytes=40))
    tallies.sample(running, Progress(Phase.DOWNLOADING, done_bytes=70, reused_bytes=40))
    assert tallies.download_bytes == {("minilm", "hf"): 30}
    tallies.fold([download(OperationState.SUCCEEDED, 100, 40, phase=Phase.NONE)])
    assert tallies.download_bytes == {("minilm", "hf"): 60}


def test_a_pause_counts_nothing_twice(tallies: Tallies) -> None:
    """What came before a pause is reused after it; a stale sample in between changes nothing."""
    tallies.fold([download(OperationState.RUNNING), download(OperationState.PAUSED, 50)])
    tallies.fold([download(OperationState.QUEUED, 50), download(OperationState.RUNNING, 50)])
    running = replace(DOWNLOAD, state=OperationState.RUNNING)
    tallies.sample(running, Progress(Phase.PLANNING, done_bytes=50))
    assert tallies.download_bytes == {("minilm", "hf"): 50}
    tallies.sample(running, Progress(Phase.DOWNLOADING, done_bytes=60, reused_bytes=50))
    tallies.fold([download(OperationState.RUNNING, 60, priority=5)])
    tallies.fold([download(OperationState.CANCELLED, 80, 50)])
    assert tallies.download_bytes == {("minilm", "hf"): 80}


def test_a_paused_download_that_is_cancelled_brought_nothing_more(tallies: Tallies) -> None:
    """Its last event still carries the progress of before the pause."""
    tallies.fold([download(OperationState.RUNNING), download(OperationState.PAUSED, 50)])
    tallies.fold([download(OperationState.CANCELLED, 50)])
    assert tallies.download_bytes == {("minilm", "hf"): 50}


def test_a_download_that_had_nothing_to_do_counts_nothing(tallies: Tallies) -> None:
    """It succeeds without ever having run."""
    tallies.fold([download(OperationState.SUCCEEDED, 100, 0, phase=Phase.NONE)])
    assert not tallies.download_bytes


def test_failures_are_counted_by_reason(tallies: Tallies) -> None:
    """A failed download counts under its error's reason; a failed load does not."""
    error = StoredError("GATED", "no")
    tallies.fold([download(OperationState.FAILED, error=error)])
    tallies.fold([download(OperationState.FAILED, error=error, kind=OperationKind.LOAD)])
    assert tallies.download_failures == {"GATED": 1}


def test_running_downloads_are_those_that_have_begun() -> None:
    """Queued, paused and ended ones are not, nor are operations of other kinds."""
    states = [replace(DOWNLOAD, id=s.value, state=s) for s in OperationState]
    load = replace(DOWNLOAD, kind=OperationKind.LOAD, state=OperationState.RUNNING)
    assert [o.id for o in running_downloads([*states, load])] == ["RUNNING"]


# --- labels ---------------------------------------------------------------------------------------


def test_a_deleted_model_takes_its_counts_along(tallies: Tallies) -> None:
    """Models that come and go leave no series behind; what is told of them later has one name."""
    tallies.fold(
        [
            instance(InstanceState.READY, "READY"),
            instance(InstanceState.DRAINING, "EVICTED"),
            event(Kind.MODEL, "minilm", None, "DELETED"),
            instance(InstanceState.DRAINING, "EVICTED"),
        ]
    )
    assert tallies.evictions == {(UNKNOWN, "EVICTED"): 1}
    assert not tallies.loads
    assert not tallies.load_seconds
    assert tallies.label("minilm") == UNKNOWN


def test_a_new_model_has_a_label_at_once(tallies: Tallies) -> None:
    """Models are known from the start or from the event that made them."""
    assert tallies.label("minilm") == "minilm"
    assert tallies.label("other") == UNKNOWN
    tallies.fold([event(Kind.MODEL, "other", replace(MODEL, id="other"), "CREATED")])
    assert tallies.label("other") == "other"
