"""Operations by themselves: begun, watched, waited for, cancelled, ended, forgotten."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    FINAL_STATES,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
)
from modelhostd.host.history import COMPACT_EVERY
from modelhostd.host.operations import Operations
from modelhostd.host.registry import History
from tests.fakes.clock import FakeClock, settle
from tests.fakes.database import FakeDisk, disk_full
from tests.host.registry_desk import Desk, model
from tests.support import DEADLINE_S

CHECK = OperationKind.CHECK_STORAGE


class Table(Desk):
    """Operations over a fake database."""

    def __init__(self, disk: FakeDisk, clock: FakeClock, history: History | None = None) -> None:
        super().__init__(disk, clock, history)
        self.operations = Operations(self.registry, keep_count=5, keep_age_s=3600.0)

    async def begin(self, join_key: str = "") -> Operation:
        return await self.operations.start(CHECK, join_key=join_key)

    def record(self, key: str, result: Mapping[str, Any] | None = None) -> None:
        """End an operation well."""
        self.registry.record(self.operations.succeeded(key, result or {}))

    async def seen(self, key: str) -> list[OperationState]:
        """Return the states that a watch sees until its end."""
        return [o.state async for o in self.operations.watch(key)]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def table(clock: FakeClock) -> AsyncIterator[Table]:
    made = Table(FakeDisk(), clock)
    await made.registry.open()
    yield made
    await made.database.release_commits()
    await made.operations.stop(5.0)
    await made.registry.close()


async def test_a_watch_sees_every_state_and_ends(table: Table) -> None:
    """A watch sends the state at once, then each change, and ends after the final one."""
    operation = await table.begin()
    watch = asyncio.ensure_future(table.seen(operation.id))
    await settle()
    table.registry.record(table.operations.running(operation.id, Phase.VERIFYING))
    await settle()
    table.record(operation.id)
    assert await watch == [
        OperationState.QUEUED,
        OperationState.RUNNING,
        OperationState.SUCCEEDED,
    ]


async def test_a_watch_misses_nothing_before_it_is_first_read(table: Table) -> None:
    """What happens between the call and the first read is in the stream."""
    operation = await table.begin()
    watch = table.operations.watch(operation.id)
    table.registry.record(table.operations.running(operation.id))
    await table.registry.flush()
    table.record(operation.id)
    await table.registry.flush()
    assert [o.state async for o in watch][1:] == [
        OperationState.RUNNING,
        OperationState.SUCCEEDED,
    ]


async def test_a_watch_of_what_has_ended_is_one_state(table: Table) -> None:
    """Watching an operation that has ended sends its final state and ends; an unknown one raises."""
    operation = await table.begin()
    table.record(operation.id)
    await table.registry.flush()
    assert await table.seen(operation.id) == [OperationState.SUCCEEDED]
    with pytest.raises(ModelhostError) as caught:
        table.operations.watch("00000000")
    assert caught.value.reason is Reason.OPERATION_NOT_FOUND


async def test_samples_are_the_latest_not_all(table: Table) -> None:
    """A thousand samples at once are few states in a watch, the last of them the newest."""
    operation = await table.begin()
    table.registry.record(table.operations.running(operation.id))
    watch = table.operations.watch(operation.id)
    seen = [await anext(watch)]
    for number in range(1000):
        table.operations.report(operation.id, Progress(Phase.VERIFYING, done_bytes=number))
    async with asyncio.timeout(DEADLINE_S):
        while seen[-1].progress.done_bytes != 999:
            seen.append(await anext(watch))
    assert len(seen) < 10
    await watch.aclose()


async def test_a_watch_that_history_overtakes_goes_on(clock: FakeClock) -> None:
    """A watcher who reads so slowly that its place is gone is given the state as it is, and the end."""
    table = Table(FakeDisk(), clock, History(count=10, ring=5))
    await table.registry.open()
    operation = await table.begin()
    watch = table.operations.watch(operation.id)
    states = [(await anext(watch)).state]
    table.registry.record(table.operations.running(operation.id))
    for _ in range(2 * COMPACT_EVERY // 100):
        await table.registry.stage([model("a", str(n)) for n in range(100)])
    assert table.registry.journal.first_sequence > 3
    states.append((await anext(watch)).state)
    table.record(operation.id)
    states += [o.state async for o in watch]
    # Where all that took longer than between two samples, one comes in between.
    each = [state for state, _ in itertools.groupby(states)]
    assert each == [OperationState.QUEUED, OperationState.RUNNING, OperationState.SUCCEEDED]
    await table.registry.close()


async def test_a_watch_ends_when_its_operation_is_forgotten_unseen(clock: FakeClock) -> None:
    """A watcher who missed the end and all history of it does not wait for ever."""
    table = Table(FakeDisk(), clock, History(count=10, ring=5))
    await table.registry.open()
    operation = await table.begin()
    watch = table.operations.watch(operation.id)
    await anext(watch)
    table.record(operation.id)
    await table.registry.flush()
    await clock.advance(7200.0)
    await table.begin()
    for _ in range(2 * COMPACT_EVERY // 100):
        await table.registry.stage([model("a", str(n)) for n in range(100)])
    assert [o async for o in watch] == []
    await table.registry.close()


async def test_a_wait_has_an_end_of_its_own(table: Table) -> None:
    """Waiting returns the operation as it is at the deadline, and as it ended before that."""
    operation = await table.begin()
    waited = await table.operations.wait(operation.id, timeout_s=0.0)
    assert waited.state is OperationState.QUEUED
    waiting = asyncio.ensure_future(table.operations.wait(operation.id, timeout_s=None))
    await settle()
    table.record(operation.id)
    assert (await waiting).state is OperationState.SUCCEEDED


async def test_equal_work_joins_until_it_has_ended(table: Table) -> None:
    """Work with the same key joins the unfinished operation, at no time one that has ended."""
    first = await table.begin("x")
    assert (await table.begin("x")).id == first.id
    table.record(first.id)
    assert (await table.begin("x")).id != first.id


async def test_finished_operations_are_forgotten(table: Table, clock: FakeClock) -> None:
    """Finished operations are kept by count and by age, those done at once as well; others stay."""
    kept = await table.begin()
    for _ in range(20):
        _, done = table.operations.done_already(CHECK, "a", {})
        await done
    assert len(table.operations.list()) == 1 + 6
    await clock.advance(7200.0)
    await table.begin()
    assert len(table.operations.list()) == 2
    assert table.operations.get(kept.id).state is OperationState.QUEUED


async def test_nothing_is_kept_of_what_has_ended(table: Table) -> None:
    """Samples and cancel handlers go with the end of an operation, and late ones are not taken."""
    operation = await table.begin()
    table.operations.on_cancel(operation.id, lambda: None)
    table.operations.report(operation.id, Progress(done_bytes=1))
    table.record(operation.id)
    await table.registry.flush()
    table.operations.report(operation.id, Progress(done_bytes=2))
    assert table.operations.samples_after(0)[1] == {}
    assert not table.operations._cancel


async def test_nothing_is_kept_of_what_was_never_stored(table: Table) -> None:
    """An operation whose commit failed leaves no sample, no handler and no work behind."""
    begun: list[Operation] = []
    table.database.fail_commits()
    operation, _, done = table.operations.begin(CHECK, begun=begun.append)
    table.operations.on_cancel(operation.id, lambda: None)
    with pytest.raises(ModelhostError):
        await done
    assert not begun
    assert not table.operations._cancel
    assert not table.registry.decided.operations


async def test_work_begins_though_its_caller_has_gone(table: Table) -> None:
    """The work of an operation begins when it is durable, whether or not the caller still waits."""
    begun: list[Operation] = []
    table.database.hold_commits()
    call = asyncio.ensure_future(table.operations.start(CHECK, begun=begun.append))
    await table.database.wait_for_waiting(1)
    assert not begun
    call.cancel()
    await table.database.release_commits()
    await table.registry.flush()
    assert len(begun) == 1


async def test_places_in_the_queue(table: Table) -> None:
    """Waiting operations know their place among those of their kind, by priority and arrival."""
    keys = [(await table.begin()).id for _ in range(3)]
    other = await table.operations.start(OperationKind.VERIFY)
    first = await table.operations.start(CHECK, priority=7)
    places = {o.id: o.queue_position for o in table.operations.list()}
    assert [places[k] for k in (first.id, *keys, other.id)] == [1, 2, 3, 4, 1]
    assert table.operations.get(keys[2]).queue_position == 4


async def _run(table: Table, work: Any, *, cancellable: bool = False) -> Operation:
    return await table.operations.start(
        CHECK,
        begun=lambda o: table.operations.run(o.id, Phase.VERIFYING, work, cancellable=cancellable),
    )


async def test_work_ends_its_operation(table: Table) -> None:
    """What work returns is the result, what it raises is the error; a bug is INTERNAL with an id."""

    async def well() -> Mapping[str, Any]:
        return {"findings": ()}

    async def badly() -> Mapping[str, Any]:
        raise ModelhostError(Reason.STORAGE_ERROR, "no", {"path": "p", "cause": "c"})

    async def bug() -> Mapping[str, Any]:
        raise ZeroDivisionError

    reasons = []
    for work in (well, badly, bug):
        operation = await _run(table, work)
        done = await table.operations.wait(operation.id, timeout_s=DEADLINE_S)
        reasons.append((done.state.value, done.error and done.error.reason))
        assert done.error is None or "ZeroDivision" not in done.error.message
    assert reasons == [("SUCCEEDED", None), ("FAILED", "STORAGE_ERROR"), ("FAILED", "INTERNAL")]


async def test_an_outcome_is_stored_when_the_disk_has_room(table: Table, clock: FakeClock) -> None:
    """An outcome whose commits fail is tried again until one succeeds."""
    go = asyncio.Event()

    async def work() -> Mapping[str, Any]:
        await go.wait()
        return {}

    operation = await _run(table, work)
    await settle()
    table.database.fail_commits(*[disk_full() for _ in range(4)])
    go.set()
    await clock.advance(1.0)
    assert table.operations.get(operation.id).state is OperationState.RUNNING
    await clock.advance(20.0)
    assert table.operations.get(operation.id).state is OperationState.SUCCEEDED


async def test_an_outcome_that_cannot_be_stored_ends_all_the_same(table: Table) -> None:
    """A result that the disk can never take ends its operation FAILED, not in a try without end."""

    async def work() -> Mapping[str, Any]:
        return {"findings": "\ud800"}

    operation = await _run(table, work)
    done = await table.operations.wait(operation.id, timeout_s=DEADLINE_S)
    assert done.state is OperationState.FAILED


async def test_cancellable_work_is_cancelled(table: Table) -> None:
    """Cancelling ends work at any moment, before its first step too; other work refuses."""
    started = asyncio.Event()

    async def work() -> Mapping[str, Any]:
        started.set()
        await asyncio.Event().wait()
        return {}

    running = await _run(table, work, cancellable=True)
    await started.wait()
    assert (await table.operations.cancel(running.id)).state is OperationState.CANCELLED
    ended = await table.operations.cancel(running.id)
    assert ended.state is OperationState.CANCELLED

    held: list[str] = []

    def begun(operation: Operation) -> None:
        table.operations.run(operation.id, Phase.VERIFYING, work, cancellable=True)
        table.operations._cancel[operation.id]()
        held.append(operation.id)

    await table.operations.start(CHECK, begun=begun)
    done = await table.operations.wait(held[0], timeout_s=DEADLINE_S)
    assert done.state is OperationState.CANCELLED

    stubborn = await _run(table, work)
    with pytest.raises(ModelhostError) as caught:
        await table.operations.cancel(stubborn.id)
    assert caught.value.reason is Reason.WRONG_STATE


async def test_stopping_ends_what_runs_and_leaves_it_to_the_next_daemon(table: Table) -> None:
    """At a stop the work ends; its operation stays unfinished for the next daemon to judge."""

    async def work() -> Mapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    operation = await _run(table, work, cancellable=True)
    await settle()
    await table.operations.stop(5.0)
    assert not table.operations._tasks
    assert table.operations.get(operation.id).state not in FINAL_STATES
