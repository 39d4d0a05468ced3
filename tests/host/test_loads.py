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


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def infer(run: Running, model: str, timeout_s: float | None = None) -> "asyncio.Task[bytes]":
    async def answer() -> bytes:
        return (await run.host.inference.infer(model, "", b"x", timeout_s)).payload

    return asyncio.ensure_future(answer())


async def ended(run: Running, key: str) -> OperationState:
    return (await run.host.operations.wait(key, timeout_s=5.0)).state


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
        assert await ended(run, operation.id) is OperationState.CANCELLED
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
        busy = infer(run, "a")
        await run.workers.infer_gate("a").reached()
        waiting = infer(run, "b", 30.0)
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
        request = infer(run, "a", 30.0)
        gate.open()
        second = await asking
        assert second.id != first.id
        assert await ended(run, first.id) is OperationState.CANCELLED
        assert await ended(run, second.id) is OperationState.SUCCEEDED
        assert await request == b"x"


async def test_an_unload_during_a_load_keeps_the_requests(world: World) -> None:
    """Unloading a model that loads frees its memory; the requests that wait load it again."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        load = await run.host.residency.load("a")
        request = infer(run, "a", 30.0)
        await gate.reached()
        unload = await run.host.residency.unload("a")
        gate.open()
        assert await ended(run, load.id) is OperationState.CANCELLED
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
        assert await ended(run, load.id) is OperationState.CANCELLED
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
                assert await ended(run, operation.id) in FINAL_STATES
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


async def test_a_load_that_could_not_be_stored_is_no_load(world: World) -> None:
    """A waiting load whose operation could not be stored is dropped; what runs already goes on."""
    async with world.host(budget=500) as run:
        for model in "ab":
            await run.have(model)
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = infer(run, "a")
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
        assert (await run.host.inference.infer("a", "", b"x", 5.0)).payload == b"x"
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


async def test_a_worker_lost_twice_during_a_load_fails_it(world: World) -> None:
    """A load survives one loss of its worker; at the second it fails with WORKER_LOST."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.residency.load("a")
        for _ in range(2):
            await gate.reached()
            run.workers.crash("sim-0")
            await settle()
        done = await run.failed(operation)
        assert done.error is not None
        assert done.error.reason == "WORKER_LOST"
        assert run.host.occupancy.ledger.used("sim-0") == 0
        gate.open()
        await run.load("a")


async def test_a_model_that_crashes_while_loading_is_blocked(world: World) -> None:
    """A model blamed for its worker's end at each load is BLOCKED at the fifth, not loaded again."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        crashes = 0
        while run.host.residency._crashes.blocked("a") is None:
            await run.host.residency.load("a")
            await gate.reached()
            run.workers.crash("sim-0", blamed="a")
            crashes += 1
            await settle()
        assert crashes == 5
        instance = run.host.registry.decided.instance_of("a")
        assert instance is not None
        assert instance.state is InstanceState.BLOCKED
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("a")
        assert caught.value.reason is Reason.MODEL_BLOCKED


async def test_a_crash_during_a_drain_frees_the_model(world: World) -> None:
    """A worker that dies while one of its models drains ends the drain; requests load it again."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        run.workers.infer_gate("a").close()
        first = infer(run, "a")
        await run.workers.infer_gate("a").reached()
        unload = await run.host.residency.unload("a")
        await settle()
        second = infer(run, "a", 30.0)
        await settle()
        run.workers.crash("sim-0", blamed="a")
        run.workers.infer_gate("a").open()
        with pytest.raises(ModelhostError):
            await first
        await run.end(unload)
        assert await second == b"x"


async def test_an_unload_that_raises_keeps_no_model_away(world: World) -> None:
    """Whatever a worker answers to an unload, the model can be loaded again."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        unload = run.workers.unload

        async def broken(device: str, instance: str, generation: int) -> None:
            await unload(device, instance, generation)
            raise RuntimeError("bug")

        run.workers.unload = broken  # type: ignore[method-assign]
        await run.end(await run.host.residency.unload("a"))
        await run.load("a")


async def test_a_load_that_raises_fails(world: World) -> None:
    """An exception that no worker promises fails the load and leaves nothing behind."""
    async with world.host() as run:
        await run.have("a")

        async def broken(*args: object) -> None:
            raise RuntimeError("bug")

        works, run.workers.load = run.workers.load, broken  # type: ignore[assignment,method-assign]
        done = await run.failed(await run.host.residency.load("a"))
        assert done.error is not None
        assert done.error.reason == "LOAD_FAILED"
        run.workers.load = works  # type: ignore[method-assign]
        await run.load("a")


async def test_a_load_ends_at_its_timeout(world: World) -> None:
    """A load that waits for memory ends with LOAD_TIMEOUT at its model's load_timeout."""
    async with world.host(budget=500) as run:
        await run.have("a")
        await run.have("b", load_timeout_s=2.0)
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = infer(run, "a")
        await run.workers.infer_gate("a").reached()
        operation = await run.host.residency.load("b")
        waiting = infer(run, "b")
        await world.clock.advance(2.5)
        done = await run.failed(operation)
        assert done.error is not None
        assert done.error.reason == "LOAD_TIMEOUT"
        with pytest.raises(ModelhostError) as caught:
            await waiting
        assert caught.value.reason is Reason.LOAD_TIMEOUT
        run.workers.infer_gate("a").open()
        await busy


async def test_a_pin_takes_a_waiting_load_its_room(world: World) -> None:
    """A load that waits for a busy model is refused when that model is pinned meanwhile."""
    async with world.host(budget=500) as run:
        for model in "ab":
            await run.have(model)
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = infer(run, "a")
        await run.workers.infer_gate("a").reached()
        operation = await run.host.residency.load("b")
        await run.host.models.pin("a", pinned=True)
        done = await run.failed(operation)
        assert done.error is not None
        assert done.error.reason == "OUT_OF_DEVICE_MEMORY"
        assert done.error.metadata["heldBy"] == "a"
        run.workers.infer_gate("a").open()
        await busy


async def test_what_was_measured_is_what_the_next_load_takes(world: World) -> None:
    """A model that takes more than its prediction is refused with what it took, not loaded again."""
    async with world.host() as run:
        await run.have("a")
        run.workers.measured_bytes["a"] = 1200
        await run.load("a")
        await world.clock.advance(1.0)
        assert not run.workers.resident
        with pytest.raises(ModelhostError) as caught:
            await run.host.inference.infer("a", "", b"x", 5.0)
        assert caught.value.reason is Reason.MODEL_TOO_LARGE
        assert caught.value.metadata["neededBytes"] == "1200"
        await run.host.models.update("a", lambda s: _with_precision(s, "fp16"))
        run.workers.measured_bytes["a"] = 300
        await run.load("a")


async def test_a_shrunk_budget_evicts_no_more_than_it_must(world: World) -> None:
    """While an eviction frees enough, no other model goes, however long it takes."""
    async with world.host() as run:
        for model in "abc":
            await run.have(model, 300)
            await run.load(model)
            await world.clock.advance(1.0)
        run.workers.unload_gate("a").close()
        await run.host.residency.set_budget("sim-0", 700)
        await world.clock.advance(3.0)
        run.workers.unload_gate("a").open()
        await world.clock.advance(1.0)
        assert set(run.workers.resident) == {"b", "c"}


async def test_a_budget_below_what_is_pinned_waits(world: World) -> None:
    """A budget below a pinned model evicts the others, keeps that one, and admits nothing more."""
    async with world.host() as run:
        for model in "ab":
            await run.have(model)
            await run.load(model)
        await run.host.models.pin("a", pinned=True)
        await run.host.residency.set_budget("sim-0", 100)
        await world.clock.advance(10.0)
        assert set(run.workers.resident) == {"a"}
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("b")
        assert caught.value.reason is Reason.MODEL_TOO_LARGE
        await run.host.models.pin("a", pinned=False)
        await world.clock.advance(1.0)
        assert not run.workers.resident


async def test_a_busy_model_above_the_budget_goes_after_its_requests(world: World) -> None:
    """A model that is never idle is drained once its device was above budget for a while."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.infer_gate("a")
        gate.close()
        request = infer(run, "a")
        await gate.reached()
        await run.host.residency.set_budget("sim-0", 100)
        await world.clock.advance(1.0)
        assert run.host.routes.get("a") is not None
        assert "OVER_BUDGET" not in run.reasons("instances")
        await world.clock.advance(4.0)
        assert "OVER_BUDGET" in run.reasons("instances")
        gate.open()
        assert await request == b"x"
        await world.clock.advance(1.0)
        assert not run.workers.resident


async def test_a_failed_budget_change_is_no_change(world: World) -> None:
    """When UpdateDevice cannot be stored the budget stays as it was."""
    async with world.host() as run:
        run.database.fail_commits()
        with pytest.raises(ModelhostError):
            await run.host.residency.set_budget("sim-0", 100)
        assert run.host.registry.decided.devices["sim-0"].budget_bytes == 1000


async def test_requests_that_gave_up_take_no_place(world: World) -> None:
    """Requests whose deadline passed in the queue do not count against its limit."""
    async with world.host() as run:
        await run.have("a", queue_limit=3)
        run.workers.load_gate("a").close()
        patient = infer(run, "a")
        for _ in range(5):
            for impatient in [infer(run, "a") for _ in range(2)]:
                await settle()
                impatient.cancel()
            await settle()
        last = infer(run, "a")
        await settle()
        run.workers.load_gate("a").open()
        assert [await patient, await last] == [b"x", b"x"]


async def test_a_cancelled_request_leaves_nothing_counted(world: World) -> None:
    """A request that is cancelled in the queue, at its turn or in flight is counted out again."""
    async with world.host() as run:
        await run.have("a")
        run.workers.load_gate("a").close()
        queued, at_its_turn = infer(run, "a"), infer(run, "a")
        await run.workers.load_gate("a").reached()
        queued.cancel()
        at_its_turn.cancel()
        run.workers.load_gate("a").open()
        await run.load("a")
        run.workers.infer_gate("a").close()
        in_flight = infer(run, "a")
        await run.workers.infer_gate("a").reached()
        in_flight.cancel()
        await settle()
        route = run.host.routes.get("a")
        assert route is not None
        assert (route.in_flight, run.host.inference.in_flight) == (0, 0)
        assert route.idle.is_set()


async def test_a_wrong_version_loads_nothing(world: World) -> None:
    """A request for a version that is not there is refused before anything is loaded for it."""
    async with world.host() as run:
        await run.have("a")
        with pytest.raises(ModelhostError) as caught:
            await run.host.inference.infer("a", "7", b"x", 5.0)
        assert caught.value.reason is Reason.MODEL_NOT_FOUND
        assert not run.workers.log
        assert (await run.host.inference.infer("a", "1", b"x", 5.0)).payload == b"x"


async def test_without_load_on_demand_a_drain_is_an_end(world: World) -> None:
    """With load_on_demand off a request that comes during an unload does not bring the model back."""
    async with world.host() as run:
        await run.have("a", load_on_demand=False)
        await run.load("a")
        gate = run.workers.unload_gate("a")
        gate.close()
        unload = await run.host.residency.unload("a")
        await gate.reached()
        with pytest.raises(ModelhostError) as caught:
            await run.host.inference.infer("a", "", b"x", 5.0)
        assert caught.value.reason is Reason.MODEL_NOT_LOADED
        gate.open()
        await run.end(unload)
        assert not run.workers.resident


async def test_a_stopping_host_refuses_and_ends_every_wait(world: World) -> None:
    """When the host stops, requests in queues and new ones end SHUTTING_DOWN, running loads too."""
    async with world.host() as run:
        for model in "ab":
            await run.have(model)
        await run.load("b")
        run.workers.load_gate("a").close()
        load = await run.host.residency.load("a")
        waiting = infer(run, "a")
        await run.workers.load_gate("a").reached()
        run.workers.unload_gate("b").close()
        await run.host.residency.unload("b")
        behind_a_drain = infer(run, "b")
        await run.workers.unload_gate("b").reached()
        await run.host.stop(grace_s=1.0)
        for request in (waiting, behind_a_drain, infer(run, "b")):
            with pytest.raises(ModelhostError) as caught:
                await request
            assert caught.value.reason is Reason.SHUTTING_DOWN
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("a")
        assert caught.value.reason is Reason.SHUTTING_DOWN
        assert await ended(run, load.id) is OperationState.FAILED


async def test_a_deleted_model_leaves_no_figures(world: World) -> None:
    """Nothing is kept of deleted models: crashes, last use, measured bytes, queues, figures."""
    async with world.host() as run:
        for _ in range(3):
            await run.have("a")
            await run.load("a")
            await run.host.inference.infer("a", "", b"x", 5.0)
            run.workers.crash("sim-0", blamed="a")
            await run.load("a")
            await run.end(await run.host.models.delete("a", force=True))
        assert not run.host.routes.last_used_time
        assert not run.host.routes._queues
        assert not run.host.inference.figures
        assert not run.host.occupancy.measured
        assert run.host.residency._crashes.count("a") == 0


async def test_a_health_check_is_of_its_own_instance(world: World) -> None:
    """The verdict of a check that ends after its instance has gone says nothing of the next one."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        checked, go = asyncio.Event(), asyncio.Event()
        real = run.workers.check

        async def slow(device: str, instance: str, generation: int) -> object:
            verdict = await real(device, instance, generation)
            checked.set()
            await go.wait()
            return verdict

        run.workers.check = slow  # type: ignore[assignment,method-assign]
        run.workers.healths["a"] = (type((await real("sim-0", "1", 1))[0]).UNHEALTHY, "bad")
        check = asyncio.ensure_future(run.host.residency.check("a"))
        await checked.wait()
        await run.end(await run.host.residency.unload("a"))
        await run.load("a")
        go.set()
        await check
        assert "HEALTH" not in run.reasons("instances")


def _full() -> ModelhostError:
    return ModelhostError(Reason.INSUFFICIENT_DISK_SPACE, "full", {"path": "p"})


def _with_precision(spec: object, precision: str) -> object:
    from dataclasses import replace

    return replace(spec, config=replace(spec.config, precision=precision))  # type: ignore
