"""Slots: switched beside the old model or in its place, without a request refused, and what stops a switch."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Kind, Operation, OperationState, Settings, Slot
from modelhostd.host.registry import Request
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.support import DEADLINE_S, wait_until_async


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def slot(run: Running) -> Slot:
    return run.host.registry.committed.slots["role"]


def answered(run: Running, model: str) -> int:
    """Return how many requests the model's instance has answered."""
    route = run.host.routes.get(model)
    return route.request_count if route is not None else 0


async def switch(run: Running, model: str, **given: object) -> Operation:
    """Begin a switch of the slot ``role``."""
    return await run.host.slots.switch("role", model, **given)  # type: ignore[arg-type]


async def standing(run: Running, *others: str) -> None:
    """Have ``old`` behind the slot ``role``, loaded, and other models on disk."""
    for model in ("old", *others):
        await run.have(model)
    await run.end(await switch(run, "old"))


async def test_a_switch_loads_first_and_then_changes_the_name(world: World) -> None:
    """Requests go to the old model until the new one is READY, to the new one from then on."""
    async with world.host() as run:
        await standing(run, "new")
        gate = run.workers.load_gate("new")
        gate.close()
        operation = await switch(run, "new")
        await gate.reached()
        assert await run.infer("role", DEADLINE_S) == b"x"
        assert slot(run).model == "old"
        assert answered(run, "old") == 1
        gate.open()
        done = await run.end(operation)
        assert done.result == {"slot": "role", "model": "new", "previous_model": "old"}
        assert slot(run).model == "new"
        await run.infer("role", DEADLINE_S)
        assert answered(run, "new") == 1
        assert set(run.workers.resident) == {"old", "new"}


async def test_slot_and_operation_change_at_one_moment(world: World) -> None:
    """The event of the slot and that of its operation are of one commit; it names the model before."""
    async with world.host() as run:
        await standing(run, "new")
        operation = await run.end(await switch(run, "new"))
        events = run.host.registry.journal._ring.read(1, 10_000) or ()
        moved = [e for e in events if e.kind is Kind.SLOT][-1]
        ended = next(
            e
            for e in events
            if isinstance(e.resource, Operation)
            and (e.key, e.resource.state) == (operation.id, OperationState.SUCCEEDED)
        )
        assert (moved.time, abs(moved.sequence - ended.sequence)) == (ended.time, 1)
        assert moved.details == {"model": "new", "previousModel": "old"}


@pytest.mark.parametrize("busy", [False, True])
async def test_where_both_do_not_fit_requests_wait(world: World, busy: bool) -> None:
    """With room for one, the old model goes first and requests to the slot wait for the new one."""
    async with world.host(budget=500) as run:
        await standing(run, "new")
        last = None
        if busy:
            run.workers.infer_gate("old").close()
            last = run.infer("role", 60.0)
            await run.workers.infer_gate("old").reached()
        gate = run.workers.load_gate("new")
        gate.close()
        operation = await switch(run, "new")
        requests = [run.infer("role", 60.0) for _ in range(5)]
        await settle()
        if last is not None:
            run.workers.infer_gate("old").open()
            assert await last == b"x"
        for _ in range(20):
            await world.clock.advance(0.5)
        await gate.reached()
        assert not any(request.done() for request in requests)
        gate.open()
        await run.end(operation)
        assert await asyncio.gather(*requests) == [b"x"] * 5
        assert answered(run, "new") == 5
        assert set(run.workers.resident) == {"new"}
        assert [verb for verb, _, model, _ in run.workers.log if model == "old"].count("load") == 1


@pytest.mark.parametrize("budget", [1000, 500])
async def test_a_load_that_fails_leaves_the_slot(world: World, budget: int) -> None:
    """The operation has the load's error, the slot stands for the old model, which goes on answering."""
    async with world.host(budget=budget) as run:
        await standing(run, "new")
        error = ModelhostError(Reason.LOAD_FAILED, "no", {"model": "new"})
        run.workers.load_errors["new"] = error
        waiting = run.infer("role", 60.0) if budget == 1000 else None
        done = await run.failed(await switch(run, "new"))
        assert done.error is not None
        assert done.error.reason == "LOAD_FAILED"
        assert slot(run).model == "old"
        assert await run.infer("role", 60.0) == b"x"
        if waiting is not None:
            await waiting


async def test_a_cancelled_switch_lets_requests_go_on(world: World) -> None:
    """Who waited is served by the old model, which is loaded again where it had to go."""
    async with world.host(budget=500) as run:
        await standing(run, "new")
        gate = run.workers.load_gate("new")
        gate.close()
        operation = await switch(run, "new")
        await gate.reached()
        request = run.infer("role", 60.0)
        await settle()
        cancel = asyncio.ensure_future(run.host.operations.cancel(operation.id))
        await settle()
        gate.open()
        assert (await cancel).state is OperationState.CANCELLED
        for _ in range(20):
            await world.clock.advance(0.5)
        assert await request == b"x"
        assert slot(run).model == "old"


async def test_a_request_s_deadline_holds_while_it_waits(world: World) -> None:
    """A request that waits for a switch ends when its own time is up, and too many are refused."""
    async with world.host(budget=500) as run:
        await standing(run, "new")
        await run.host.update_settings(Settings(queue_limit=2), ["queue_limit"])
        gate = run.workers.load_gate("new")
        gate.close()
        operation = await switch(run, "new")
        await gate.reached()
        requests = [run.infer("role", 0.2) for _ in range(2)]
        await settle()
        with pytest.raises(ModelhostError) as caught:
            await run.infer("role", DEADLINE_S)
        assert caught.value.reason is Reason.QUEUE_FULL
        for request in requests:
            with pytest.raises(ModelhostError) as caught:
                await request
            assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        gate.open()
        await run.end(operation)
        assert await run.infer("role", DEADLINE_S) == b"x"


async def test_the_old_model_is_unloaded_where_asked(world: World) -> None:
    """With unload_previous the old model ends what it has and goes; without it stays."""
    async with world.host() as run:
        await standing(run, "new")
        run.workers.infer_gate("old").close()
        last = run.infer("role", 60.0)
        await run.workers.infer_gate("old").reached()
        await run.end(await switch(run, "new", unload_previous=True))
        assert set(run.workers.resident) == {"old", "new"}
        run.workers.infer_gate("old").open()
        assert await last == b"x"
        await wait_until_async(lambda: set(run.workers.resident) == {"new"})


async def test_of_two_switches_from_one_state_one_wins(world: World) -> None:
    """With the same etag the second ends with ETAG_MISMATCH, whichever began first."""
    async with world.host(budget=2000) as run:
        await standing(run, "one", "two")
        etag = str(slot(run).edit)
        gate = run.workers.load_gate("one")
        gate.close()
        first = await switch(run, "one", etag=etag)
        await gate.reached()
        await run.end(await switch(run, "two", etag=etag))
        gate.open()
        done = await run.failed(first)
        assert done.error is not None
        assert done.error.reason == "ETAG_MISMATCH"
        assert slot(run).model == "two"
        with pytest.raises(ModelhostError) as caught:
            await switch(run, "one", etag=etag)
        assert caught.value.reason is Reason.ETAG_MISMATCH


async def test_equal_switches_are_one(world: World) -> None:
    """The same switch, asked for again or with the same request id, is the same operation."""
    async with world.host() as run:
        await standing(run, "new")
        gate = run.workers.load_gate("new")
        gate.close()
        request = Request("once", "content")
        first = await switch(run, "new", request=request)
        assert (await switch(run, "new")).id == first.id
        gate.open()
        await run.end(first)
        assert (await switch(run, "new", request=request)).id == first.id
        assert run.reasons("slots") == ["SWITCHED", "SWITCHED"]


async def test_a_model_of_another_task_is_refused(world: World) -> None:
    """A slot keeps its task: who calls it could not use another one's answers."""
    async with world.host() as run:
        await standing(run)
        await run.add("other")
        await run.host.models.update("other", lambda spec: replace(spec, task="text-generation"))
        await run.host.models.update("old", lambda spec: replace(spec, task="feature-extraction"))
        with pytest.raises(ModelhostError) as caught:
            await switch(run, "other")
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert "feature-extraction" in caught.value.message
        assert slot(run).model == "old"


async def test_a_slot_in_use_keeps_its_model(world: World) -> None:
    """A model behind a slot is deleted only with force, and then the slot goes with it."""
    async with world.host() as run:
        await standing(run)
        await run.end(await run.host.residency.unload("old"))
        with pytest.raises(ModelhostError) as caught:
            await run.host.models.delete("old", force=False)
        assert caught.value.reason is Reason.WRONG_STATE
        assert "'role'" in caught.value.message
        await run.end(await run.host.models.delete("old", force=True))
        assert not run.host.registry.committed.slots
        with pytest.raises(ModelhostError) as caught:
            await run.infer("role", DEADLINE_S)
        assert caught.value.reason is Reason.MODEL_NOT_FOUND


async def test_a_cleared_slot_is_gone(world: World) -> None:
    """Its name means nothing any more, its model stays; with a stale etag nothing happens."""
    async with world.host() as run:
        await standing(run)
        with pytest.raises(ModelhostError) as caught:
            await run.host.slots.clear("role", "99")
        assert caught.value.reason is Reason.ETAG_MISMATCH
        await run.host.slots.clear("role")
        assert set(run.workers.resident) == {"old"}
        for call in (partial(run.host.slots.clear, "role"), partial(run.infer, "role", 5.0)):
            with pytest.raises(ModelhostError) as caught:
                await call()
            assert caught.value.reason in (Reason.SLOT_NOT_FOUND, Reason.MODEL_NOT_FOUND)


async def test_a_slot_s_model_is_there_after_a_restart(world: World) -> None:
    """The slot stands, and its model is loaded by the next daemon itself."""
    async with world.host() as run:
        await standing(run)
    async with world.host() as run:
        assert slot(run).model == "old"
        await wait_until_async(lambda: set(run.workers.resident) == {"old"})
        assert await run.infer("role", DEADLINE_S) == b"x"
