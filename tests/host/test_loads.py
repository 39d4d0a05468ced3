"""Loads that meet other commands: stopped at each stage, joined, wanted again, refused, undone."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    FINAL_STATES,
    InstanceState,
    OperationState,
)
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def nothing_left(run: Running, model: str) -> bool:
    """Whether no trace of a load is left: no bytes, no route, no instance, nobody waits."""
    return (
        not run.workers.device_bytes("sim-0")
        and run.host.occupancy.ledger.used("sim-0") == 0
        and run.host.routes.get(model) is None
        and not run.host.routes.queued(model)
        and run.host.registry.decided.instance_of(model) is None
    )


@pytest.mark.parametrize("stage", ["before its first step", "in the worker", "in its last step"])
async def test_a_load_is_cancelled_at_each_stage(world: World, stage: str) -> None:
    """A cancelled load ends CANCELLED and leaves nothing, whatever it was doing; a retry works."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.residency.load("a")
        if stage != "before its first step":
            await gate.reached()
        if stage == "in its last step":
            gate.open()
        run.host.residency.loads.cancel("a")
        gate.open()
        assert await run.ended(operation.id) is OperationState.CANCELLED
        await settle()
        assert nothing_left(run, "a")
        await run.load("a")


async def test_a_load_that_waits_for_memory_is_cancelled(world: World) -> None:
    """A load in the queue ends at once when it is cancelled, and so do the requests for it."""
    async with world.host(budget=500) as run:
        for model in "ab":
            await run.have(model)
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = run.infer("a")
        await run.workers.infer_gate("a").reached()
        waiting = run.infer("b", 30.0)
        await settle()
        wanted = run.host.residency.loads.get("b")
        assert wanted is not None
        done = await run.host.operations.cancel(wanted.operations[0])
        assert done.state is OperationState.CANCELLED
        with pytest.raises(ModelhostError) as caught:
            await waiting
        assert caught.value.reason is Reason.CANCELLED
        run.workers.infer_gate("a").open()
        assert await busy == b"x"


async def test_who_asks_while_a_load_is_stopped_gets_another(world: World) -> None:
    """A load and a request that come while the old load is being stopped do not end with it."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        first = await run.host.residency.load("a")
        await gate.reached()
        run.host.residency.loads.cancel("a")
        asking = asyncio.ensure_future(run.host.residency.load("a"))
        request = run.infer("a", 30.0)
        gate.open()
        second = await asking
        assert second.id != first.id
        assert await run.ended(first.id) is OperationState.CANCELLED
        assert await run.ended(second.id) is OperationState.SUCCEEDED
        assert await request == b"x"


async def test_an_unload_during_a_load_keeps_the_requests(world: World) -> None:
    """Unloading a model that loads frees its memory; the requests that wait load it again."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        load = await run.host.residency.load("a")
        request = run.infer("a", 30.0)
        await gate.reached()
        unload = await run.host.residency.unload("a")
        gate.open()
        assert await run.ended(load.id) is OperationState.CANCELLED
        done = await run.end(unload)
        assert done.result["freed_bytes"] == 400
        assert await request == b"x"


async def test_an_unload_after_a_load_is_another_unload(world: World) -> None:
    """Unload, load, unload in one moment ends unloaded: the second unload does not join the first."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.unload_gate("a")
        gate.close()
        first = await run.host.residency.unload("a")
        same = await run.host.residency.unload("a")
        await gate.reached()
        load = await run.host.residency.load("a")
        second = await run.host.residency.unload("a")
        assert first.id == same.id != second.id
        gate.open()
        for operation in (first, second):
            await run.end(operation)
        assert await run.ended(load.id) is OperationState.CANCELLED
        await settle()
        assert nothing_left(run, "a")


async def test_a_load_during_a_drain_waits_for_it(world: World) -> None:
    """A load of a model on its way out is done when the model has gone and come back."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.unload_gate("a")
        gate.close()
        unload = await run.host.residency.unload("a")
        await gate.reached()
        load = await run.host.residency.load("a")
        assert load.state is OperationState.QUEUED
        gate.open()
        await run.end(unload)
        await run.end(load)
        assert set(run.workers.resident) == {"a"}


async def test_storms_of_loads_and_unloads_end(world: World) -> None:
    """A hundred loads and unloads at once all end, and the ledger equals what is held."""
    async with world.host() as run:
        for model in "abc":
            await run.have(model)
        calls = []
        for number in range(100):
            residency = run.host.residency
            command = residency.unload if number % 3 == 2 else residency.load
            calls.append(asyncio.ensure_future(command("abc"[number % 3 - 1])))
            await settle(number % 4)
        operations = await asyncio.gather(*calls, return_exceptions=True)
        for operation in operations:
            if isinstance(operation, BaseException):
                assert isinstance(operation, ModelhostError)
            else:
                assert await run.ended(operation.id) in FINAL_STATES
        await world.clock.advance(5.0)
        assert run.host.occupancy.ledger.used("sim-0") == run.workers.device_bytes("sim-0")


async def test_a_caller_that_goes_away_stops_no_load(world: World) -> None:
    """A LoadModel or UnloadModel whose caller gives up before the commit is carried out all the same."""
    async with world.host() as run:
        await run.have("a")
        for command, expected in (
            (run.host.residency.load, {"a"}),
            (run.host.residency.unload, set()),
        ):
            run.database.hold_commits()
            call = asyncio.ensure_future(command("a"))
            await run.database.wait_for_waiting(1)
            call.cancel()
            await run.database.release_commits()
            await world.clock.advance(1.0)
            assert set(run.workers.resident) == expected
        assert all(o.state is OperationState.SUCCEEDED for o in run.host.operations.list())


async def test_a_load_ends_though_commits_fail(world: World) -> None:
    """When the commits of a load fail its operation still ends, with the next that succeeds."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.residency.load("a")
        await gate.reached()
        await run.host.registry.flush()
        run.database.fail_commits(*[_full() for _ in range(2)])
        gate.open()
        await settle()
        assert run.host.operations.get(operation.id).state is OperationState.RUNNING
        await world.clock.advance(5.0)
        await run.end(operation)
        instance = run.host.registry.committed.instance_of("a")
        assert instance is not None
        assert instance.state is InstanceState.READY
        assert (await run.load("a")).id != operation.id


async def test_a_load_does_not_wait_for_an_eviction_that_is_for_another(world: World) -> None:
    """While memory is being freed for a large model, a small one that fits beside it loads at once."""
    async with world.host() as run:
        for model, size in {"a": 400, "b": 400, "large": 500, "small": 100}.items():
            await run.have(model, size)
        for model in "ab":
            await run.load(model)
            await world.clock.advance(1.0)
        await run.host.models.pin("b", pinned=True)
        gate = run.workers.unload_gate("a")
        gate.close()
        large = await run.host.residency.load("large")
        await gate.reached()
        await run.load("small")
        assert set(run.workers.resident) == {"b", "small"}
        gate.open()
        await run.end(large)
        assert run.workers.peak_bytes["sim-0"] <= 1000


async def test_a_load_that_could_not_be_stored_is_no_load(world: World) -> None:
    """A waiting load whose operation could not be stored is dropped; what runs already goes on."""
    async with world.host(budget=500) as run:
        for model in "ab":
            await run.have(model)
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = run.infer("a")
        await run.workers.infer_gate("a").reached()
        run.database.fail_commits()
        with pytest.raises(ModelhostError):
            await run.host.residency.load("b")
        assert run.host.residency.loads.get("b") is None
        run.workers.infer_gate("a").open()
        await busy
        run.database.fail_commits()
        with pytest.raises(ModelhostError):
            await run.host.residency.load("b")
        await world.clock.advance(5.0)
        assert set(run.workers.resident) <= {"a", "b"}
        done = await run.load("b")
        assert done.state is OperationState.SUCCEEDED
        assert all(o.state in FINAL_STATES for o in run.host.operations.list())


async def test_requests_load_a_model_though_commits_fail(world: World) -> None:
    """A request is served by a load that no commit could tell of yet."""
    async with world.host() as run:
        await run.have("a")
        run.database.fail_commits(*[_full() for _ in range(3)])
        assert (await run.host.inference.infer("a", "", b"x", DEADLINE_S)).payload == b"x"
        await world.clock.advance(5.0)
        await run.host.registry.flush()
        assert run.reasons("instances")[-1] == "READY"
        assert all(o.state in FINAL_STATES for o in run.host.operations.list())


async def test_a_refused_caller_harms_no_load(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoadModel that is refused because the registry's queue is full leaves the one it joins alone."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.residency.load("a")
        await gate.reached()
        monkeypatch.setattr("modelhostd.host.registry.PENDING_MAX", 0)
        with pytest.raises(ModelhostError):
            await run.host.residency.load("a")
        monkeypatch.undo()
        gate.open()
        await run.end(operation)


async def test_a_load_ends_at_its_timeout(world: World) -> None:
    """A load that waits for memory ends with LOAD_TIMEOUT at its model's load_timeout."""
    async with world.host(budget=500) as run:
        await run.have("a")
        await run.have("b", load_timeout_s=2.0)
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = run.infer("a")
        await run.workers.infer_gate("a").reached()
        operation = await run.host.residency.load("b")
        waiting = run.infer("b")
        await world.clock.advance(2.5)
        done = await run.failed(operation)
        assert done.error is not None
        assert done.error.reason == "LOAD_TIMEOUT"
        with pytest.raises(ModelhostError) as caught:
            await waiting
        assert caught.value.reason is Reason.LOAD_TIMEOUT
        run.workers.infer_gate("a").open()
        await busy


async def test_a_compiled_model_is_given_time_to_compile(world: World) -> None:
    """Where nothing is said of its timeout its load ends later than another, but it ends."""
    async with world.host(budget=500) as run:
        await run.have("a")
        await run.have("b", backend_options={"compile": True})
        await run.have("c")
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = run.infer("a")
        await run.workers.infer_gate("a").reached()
        compiled, other = [await run.host.residency.load(model) for model in "bc"]
        await world.clock.advance(200)
        await run.failed(other)
        assert run.host.operations.get(compiled.id).state not in FINAL_STATES
        await world.clock.advance(600)
        await run.failed(compiled)
        run.workers.infer_gate("a").open()
        await busy


def _full() -> ModelhostError:
    return ModelhostError(Reason.INSUFFICIENT_DISK_SPACE, "full", {"path": "p"})


async def test_waiting_loads_stand_in_the_order_they_begin(world: World) -> None:
    """An operation has its load's priority; its place says who comes next, and another priority changes both."""
    async with world.host(budget=500) as run:
        for model in "abcd":
            await run.have(model)
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = run.infer("a")
        await run.workers.infer_gate("a").reached()
        loads = {
            model: await run.host.residency.load(model, priority=priority)
            for model, priority in (("b", -5), ("c", 50), ("d", 0))
        }

        def places() -> list[tuple[int, int]]:
            found = [run.host.operations.get(load.id) for load in loads.values()]
            return [(one.priority, one.queue_position) for one in found]

        assert places() == [(-5, 3), (50, 1), (0, 2)]
        await run.host.update_operation(loads["b"].id, priority=100)
        assert places() == [(100, 1), (50, 2), (0, 3)]
        run.workers.infer_gate("a").open()
        assert await busy == b"x"
        await world.clock.advance(1.0)
        assert set(run.workers.resident) == {"d"}
