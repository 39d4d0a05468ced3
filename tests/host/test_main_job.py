"""The main job over fakes: register, download, load, infer, evict, come back."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    ArtifactState,
    InstanceState,
    Kind,
    OperationState,
)
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_model_is_downloaded_loaded_and_answers(world: World) -> None:
    """A registered model goes through its states to an answer, and each change is an event."""
    async with world.host() as run:
        await run.add("a")
        assert run.host.models.get("a").state is ArtifactState.ABSENT
        await run.end(await run.host.transfers.download("a"))
        assert run.host.models.get("a").state is ArtifactState.AVAILABLE
        await run.load("a")
        reply = await run.host.inference.infer("a", "", b"hello", DEADLINE_S)
        assert reply.payload == b"hello"
        assert run.reasons("models") == [
            "CREATED",
            "DOWNLOAD_QUEUED",
            "DOWNLOADING",
            "VERIFYING",
            "AVAILABLE",
        ]
        assert run.reasons("instances") == ["QUEUED", "LOADING", "READY"]


async def test_the_least_recently_used_model_makes_room(world: World) -> None:
    """With room for two, a third load evicts the one that was used longest ago."""
    async with world.host() as run:
        for model in "abc":
            await run.have(model)
        await run.load("a")
        await world.clock.advance(1.0)
        await run.load("b")
        await world.clock.advance(1.0)
        await run.host.inference.infer("a", "", b"x", DEADLINE_S)
        await world.clock.advance(1.0)
        await run.load("c")
        assert set(run.workers.resident) == {"a", "c"}
        evicted = [
            e for e in run.host.registry.journal._ring.read(1, 1000) or () if e.reason == "EVICTED"
        ]
        assert [e.details["for"] for e in evicted] == ["c"]
        assert run.workers.peak_bytes["sim-0"] <= 1000


async def test_an_evicted_model_comes_back_on_demand(world: World) -> None:
    """A request for a model that is on disk waits while the model is loaded, and is answered."""
    async with world.host() as run:
        for model in "abc":
            await run.have(model)
            await run.load(model)
            await world.clock.advance(1.0)
        assert set(run.workers.resident) == {"b", "c"}
        reply = await run.host.inference.infer("a", "", b"again", DEADLINE_S)
        assert reply.payload == b"again"
        assert set(run.workers.resident) == {"a", "c"}


async def test_what_can_never_fit_is_refused_at_once(world: World) -> None:
    """A model above every budget is MODEL_TOO_LARGE with the numbers, and evicts nobody."""
    async with world.host() as run:
        await run.have("small")
        await run.load("small")
        await run.have("huge", 5000)
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("huge")
        assert caught.value.reason is Reason.MODEL_TOO_LARGE
        assert caught.value.metadata["neededBytes"] == "5000"
        assert caught.value.metadata["budgetBytes"] == "1000"
        assert set(run.workers.resident) == {"small"}


async def test_pins_hold_memory(world: World) -> None:
    """What pinned models hold is not evicted: the refusal names them."""
    async with world.host() as run:
        for model in "abc":
            await run.have(model)
        for model in "ab":
            await run.load(model)
            await run.host.models.pin(model, pinned=True)
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("c")
        assert caught.value.reason is Reason.OUT_OF_DEVICE_MEMORY
        assert caught.value.metadata["heldBy"] == "a,b"
        await run.host.models.pin("a", pinned=False)
        await run.load("c")
        assert set(run.workers.resident) == {"b", "c"}


async def test_a_busy_model_finishes_before_it_goes(world: World) -> None:
    """A victim in use keeps its request; new ones for it wait and are answered after it came back."""
    async with world.host(budget=500) as run:
        await run.have("a")
        await run.have("b")
        await run.load("a")
        gate = run.workers.infer_gate("a")
        gate.close()
        first = asyncio.ensure_future(run.host.inference.infer("a", "", b"1", None))
        await gate.reached()
        loading = await run.host.residency.load("b")
        await world.clock.advance(1.0)
        assert run.host.operations.get(loading.id).state is not OperationState.SUCCEEDED
        await world.clock.advance(3.0)
        instance = run.host.registry.committed.instance_of("a")
        assert instance is not None
        assert instance.state is InstanceState.DRAINING
        second = asyncio.ensure_future(run.host.inference.infer("a", "", b"2", None))
        gate.open()
        assert (await first).payload == b"1"
        await run.end(loading)
        await world.clock.advance(1.0)
        assert (await second).payload == b"2"
        assert run.workers.peak_bytes["sim-0"] <= 500


async def test_a_crash_fails_only_what_was_in_flight(world: World) -> None:
    """After a crash the in-flight request fails WORKER_LOST and every instance comes back."""
    async with world.host() as run:
        for model in "ab":
            await run.have(model)
            await run.load(model)
        gate = run.workers.infer_gate("a")
        gate.close()
        request = asyncio.ensure_future(run.host.inference.infer("a", "", b"1", None))
        await gate.reached()
        run.workers.crash("sim-0", blamed="a")
        with pytest.raises(ModelhostError) as caught:
            await request
        assert caught.value.reason is Reason.WORKER_LOST
        gate.open()
        assert (await run.host.inference.infer("b", "", b"2", DEADLINE_S)).payload == b"2"
        assert (await run.host.inference.infer("a", "", b"3", DEADLINE_S)).payload == b"3"
        assert "CRASHED" in run.reasons("instances")


async def test_five_crashes_block_a_model(world: World) -> None:
    """A model that takes its worker down five times is BLOCKED until UnblockModel."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        for _ in range(5):
            await run.host.inference.infer("a", "", b"x", DEADLINE_S)
            run.blame("a", stderr_tail="boom")
            await run.host.registry.flush()
        with pytest.raises(ModelhostError) as caught:
            await run.host.inference.infer("a", "", b"x", DEADLINE_S)
        assert caught.value.reason is Reason.MODEL_BLOCKED
        assert "boom" in caught.value.metadata["stderr"]
        await run.host.residency.unblock("a")
        assert (await run.host.inference.infer("a", "", b"x", DEADLINE_S)).payload == b"x"


async def test_keep_alive_ends_idle_instances(world: World) -> None:
    """An instance that nobody used for keep_alive is unloaded; a used one stays."""
    async with world.host() as run:
        await run.have("a", keep_alive_s=10.0)
        await run.load("a")
        await world.clock.advance(9.0)
        await run.host.inference.infer("a", "", b"x", DEADLINE_S)
        await world.clock.advance(9.0)
        assert set(run.workers.resident) == {"a"}
        await world.clock.advance(2.0)
        assert not run.workers.resident
        assert run.reasons("instances")[-2:] == ["KEEP_ALIVE", "DRAINED"]


async def test_unload_succeeds_when_the_memory_is_free(world: World) -> None:
    """An UNLOAD operation is not SUCCEEDED before the worker says that the memory is free."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.unload_gate("a")
        gate.close()
        operation = await run.host.residency.unload("a")
        await gate.reached()
        await run.host.registry.flush()
        assert run.host.operations.get(operation.id).state is OperationState.RUNNING
        gate.open()
        done = await run.end(operation)
        assert done.result["freed_bytes"] == 400
        assert not run.workers.resident


async def test_equal_work_is_joined(world: World) -> None:
    """Two downloads of one model are one operation, and so are two loads."""
    async with world.host() as run:
        await run.add("a")
        hold = world.downloads.hold("hf://org/a")
        first = await run.host.transfers.download("a")
        second = await run.host.transfers.download("a")
        assert first.id == second.id
        await hold.reached.wait()
        hold.release()
        await run.end(first)
        loads = await asyncio.gather(run.host.residency.load("a"), run.host.residency.load("a"))
        assert loads[0].id == loads[1].id
        assert len(world.downloads.jobs) == 1


async def test_a_download_goes_on_after_a_restart(world: World) -> None:
    """A download that a crash interrupted is finished by the next daemon, under the same operation."""
    async with world.host() as run:
        await run.add("a")
        hold = world.downloads.hold("hf://org/a")
        operation = await run.host.transfers.download("a")
        await hold.reached.wait()
        await run.host.registry.flush()
        await run.crash()
    world.downloads.unhold("hf://org/a")
    async with world.host() as run:
        await run.end(operation)
        assert run.host.models.get("a").state is ArtifactState.AVAILABLE


async def test_a_restart_tells_what_is_gone(world: World) -> None:
    """Instances of a crashed daemon are gone, its loads FAILED with DAEMON_RESTARTED, pins load again."""
    async with world.host() as run:
        for model in "abc":
            await run.have(model, 300)
        await run.load("a")
        await run.host.models.pin("b", pinned=True)
        await run.load("b")
        gate = run.workers.load_gate("c")
        gate.close()
        loading = await run.host.residency.load("c")
        await gate.reached()
        last = run.host.registry.journal.last_sequence
        await run.crash()
    async with world.host() as run:
        after = await run.failed(loading)
        assert after.error is not None
        assert after.error.reason == "DAEMON_RESTARTED"
        await run.load("b")
        assert set(run.workers.resident) == {"b"}
        assert run.host.registry.journal.last_sequence > last
        gone = [e for e in await run.host.registry.journal.read(last + 1) if e.resource is None]
        assert {e.key.split("/")[0] for e in gone if e.kind is Kind.INSTANCE} == {"a", "b", "c"}


async def test_cancel_leaves_nothing_visible(world: World) -> None:
    """A cancelled download ends CANCELLED, its model is ABSENT again, and a retry works."""
    async with world.host() as run:
        await run.add("a")
        hold = world.downloads.hold("hf://org/a")
        operation = await run.host.transfers.download("a")
        await hold.reached.wait()
        cancelled = await run.host.operations.cancel(operation.id)
        assert cancelled.state is OperationState.CANCELLED
        assert run.host.models.get("a").state is ArtifactState.ABSENT
        world.downloads.unhold("hf://org/a")
        await run.end(await run.host.transfers.download("a"))


async def test_pause_and_resume(world: World) -> None:
    """A paused download keeps its operation, has no rate and no end in sight, and goes on where it stood."""
    async with world.host() as run:
        await run.add("a")
        hold = world.downloads.hold("hf://org/a")
        operation = await run.host.transfers.download("a")
        await hold.reached.wait()
        paused = await run.host.transfers.pause(operation.id)
        assert paused.state is OperationState.PAUSED
        assert paused.progress.done_bytes > 0
        assert (paused.progress.bytes_per_second, paused.progress.eta_s) == (0.0, None)
        assert run.host.models.get("a").state is ArtifactState.PAUSED
        world.downloads.unhold("hf://org/a")
        await run.host.transfers.resume(operation.id)
        await run.end(operation)


async def test_a_loaded_model_is_deleted_only_by_force(world: World) -> None:
    """DeleteModel of a loaded model is refused; forced, it drains, frees, and the entry is gone."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        with pytest.raises(ModelhostError) as caught:
            await run.host.models.delete("a", force=False)
        assert caught.value.reason is Reason.MODEL_LOADED
        done = await run.end(await run.host.models.delete("a", force=True))
        assert done.result["freed_bytes"] > 0
        with pytest.raises(ModelhostError):
            run.host.models.get("a")
        assert not run.workers.resident


async def test_a_shrunk_budget_evicts_down_to_it(world: World) -> None:
    """UpdateDevice below what idle instances hold evicts the least recently used of them."""
    async with world.host() as run:
        for model in "ab":
            await run.have(model)
            await run.load(model)
            await world.clock.advance(1.0)
        await run.host.residency.set_budget("sim-0", 500)
        await world.clock.advance(1.0)
        assert set(run.workers.resident) == {"b"}
        assert "OVER_BUDGET" in run.reasons("instances")
        device = await run.host.residency.set_budget("sim-0", None)
        assert device.budget_bytes == 1000


async def test_the_queue_of_a_model_is_bounded(world: World) -> None:
    """Requests beyond a model's queue limit are refused with QUEUE_FULL and a delay."""
    async with world.host() as run:
        await run.have("a", queue_limit=2)
        gate = run.workers.load_gate("a")
        gate.close()
        waiting = [
            asyncio.ensure_future(run.host.inference.infer("a", "", b"x", None)) for _ in range(2)
        ]
        await gate.reached()
        with pytest.raises(ModelhostError) as caught:
            await run.host.inference.infer("a", "", b"x", None)
        assert caught.value.reason is Reason.QUEUE_FULL
        assert caught.value.retry_delay_s
        gate.open()
        assert [r.payload for r in await asyncio.gather(*waiting)] == [b"x", b"x"]


async def test_a_failed_load_tells_everybody_who_waits(world: World) -> None:
    """When a load fails its operation, its instance and the waiting requests all carry the reason."""
    async with world.host() as run:
        await run.have("a")
        run.workers.load_errors["a"] = ModelhostError(
            Reason.LOAD_FAILED, "no", {"model": "a", "backend": "x", "cause": "y"}
        )
        with pytest.raises(ModelhostError) as caught:
            await run.host.inference.infer("a", "", b"x", DEADLINE_S)
        assert caught.value.reason is Reason.LOAD_FAILED
        await run.host.registry.flush()
        instance = run.host.registry.committed.instance_of("a")
        assert instance is not None
        assert instance.state is InstanceState.FAILED
        assert run.host.occupancy.ledger.used("sim-0") == 0
        del run.workers.load_errors["a"]
        await run.load("a")


async def test_a_failed_commit_undoes_the_change(world: World) -> None:
    """When the disk refuses a commit the caller is told, nothing is visible, and the next one works."""
    async with world.host() as run:
        run.database.fail_commits()
        with pytest.raises(ModelhostError) as caught:
            await run.add("a")
        assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
        assert not run.host.models.list()
        await run.add("a")
        assert [m.id for m in run.host.models.list()] == ["a"]


async def _events(run: Running) -> list[int]:
    return [e.sequence for e in run.host.registry.journal._ring.read(1, 10_000) or ()]


async def test_sequences_have_no_gap_across_restart_and_failure(world: World) -> None:
    """Sequences are contiguous from 1 across failed commits and a restart."""
    async with world.host() as run:
        await run.add("a")
        run.database.fail_commits()
        with pytest.raises(ModelhostError):
            await run.add("b")
        await run.add("b")
        first = await _events(run)
    async with world.host() as run:
        await run.add("c")
        read = [e.sequence for e in await run.host.registry.journal.read(1)]
        assert read == list(range(1, run.host.registry.journal.last_sequence + 1))
        assert read[: len(first)] == first
