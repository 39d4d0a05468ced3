"""Requests that find too little memory: another model makes room, and they are tried once more."""

from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.estimates import HALVED_AFTER_S
from modelhostd.core.residency import RETRY_S
from modelhostd.core.resources import Settings
from modelhostd.ports import LoadSpec
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def ready(run: Running, *models: str) -> None:
    """Have models loaded, the first of them the longest ago."""
    for model in models:
        await run.have(model, 300)
        await run.load(model)
        await run.world.clock.advance(1.0)


def short(run: Running, times: int) -> list[str]:
    """Let requests to ``a`` find too little memory so many times; returns who was asked."""
    asked: list[str] = []

    def answer(spec: LoadSpec, payload: bytes) -> bytes:
        asked.append(spec.model)
        if spec.model == "a" and asked.count("a") <= times:
            raise ModelhostError(Reason.OUT_OF_DEVICE_MEMORY, "no room", {"model": "a"})
        return payload

    run.workers.handler = answer
    return asked


async def test_a_request_is_repeated_after_an_eviction(world: World) -> None:
    """The model that is next to go makes room, for whom the event says, and the request is answered."""
    async with world.host(host_budget=2000) as run:
        await ready(run, "b", "c", "a")
        asked = short(run, 1)
        assert await run.infer("a", DEADLINE_S) == b"x"
        assert asked == ["a", "a"]
        assert set(run.workers.resident) == {"c", "a"}
        assert set(run.workers.warm) == {"b"}
        events = run.host.registry.journal._ring.read(1, 10_000) or ()
        (found,) = {e.details["for"] for e in events if e.reason == "EVICTED"}
        assert found == "a"
        assert run.host.inference.error_count == 0


async def test_its_model_is_planned_with_more_from_then_on(world: World) -> None:
    """What a model's requests lacked is reserved beside its weights, at once and for its next load; told by its events."""
    async with world.host() as run:
        await ready(run, "b", "c", "a")
        short(run, 1)
        assert await run.infer("a", DEADLINE_S) == b"x"
        found = run.host.registry.decided.instance_of("a")
        assert found is not None
        # 100 of 1000 bytes were free, and not enough.
        assert (found.predicted_bytes, found.measured_bytes, found.working_bytes) == (300, 300, 101)
        assert run.host.occupancy.ledger.held("sim-0", "a") == 401
        await run.host.registry.flush()
        assert "FELL_SHORT" in run.reasons("instances")
        plan = await run.end(await run.host.residency.unload("a"))
        assert plan.result["freed_bytes"] == 401
        await run.load("a")
        assert run.host.occupancy.ledger.held("sim-0", "a") == 401
        device = run.host.live_device(run.host.registry.committed.device("sim-0"))
        assert (device.resident_bytes, device.reserved_bytes) == (600, 101)


async def test_what_is_kept_for_requests_goes_by_halves(world: World) -> None:
    """Each hour without a request that lacks memory gives half of it back, on the device and for loads; one that does begins anew."""
    async with world.host() as run:
        await ready(run, "b", "c", "a")
        short(run, 1)
        assert await run.infer("a", DEADLINE_S) == b"x"
        await quiet(run, HALVED_AFTER_S - 2.0)
        assert (kept(run), run.host.residency.loads.plan("a")[1]) == (101, 401)
        await quiet(run, 2.0)
        assert (kept(run), run.host.residency.loads.plan("a")[1]) == (50, 350)
        assert run.host.occupancy.ledger.held("sim-0", "a") == 350
        await run.host.registry.flush()
        assert run.reasons("instances")[-1] == "EASED"
        await run.host.models.pin("c", pinned=True)
        short(run, 1)
        with pytest.raises(ModelhostError):
            await run.infer("a", DEADLINE_S)
        grown = kept(run)
        assert grown > 50
        await quiet(run, HALVED_AFTER_S - 2.0)
        assert kept(run) == grown
        await quiet(run, 10 * HALVED_AFTER_S)
        assert (kept(run), run.host.residency.loads.plan("a")[1]) == (0, 300)
        assert not run.host.occupancy.learned.working


async def test_what_one_version_lacked_is_nothing_of_another(world: World) -> None:
    """A larger or smaller version beside the one that serves changes nothing of what is kept for that, and starts with nothing itself."""
    async with world.host() as run:
        await ready(run, "b", "c", "a")
        for size in (600, 100):
            short(run, 1)
            assert await run.infer("a", DEADLINE_S) == b"x"
            assert kept(run) >= 101
            content = {"model.safetensors": b"%d" % size * 100}
            run.world.downloads.add("hf://org/a", content, predicted_bytes=size)
            await run.end(await run.host.transfers.download("a", refresh=True))
            before = kept(run)
            await quiet(run, HALVED_AFTER_S - 2.0)
            assert kept(run) == before
            assert run.host.residency.loads.plan("a")[1] == size
            await quiet(run, 2.0)
            assert kept(run) == before // 2


async def quiet(run: Running, seconds: float) -> None:
    """Let the last shortage of ``a`` be so much longer ago: hours of ticks take minutes."""
    working = run.host.occupancy.learned.working
    working["a"] = working["a"]._replace(since=working["a"].since - seconds)
    await run.world.clock.advance(0.5)


def kept(run: Running) -> int:
    """Return what is reserved for requests to ``a`` beside its weights."""
    found = run.host.registry.decided.instance_of("a")
    assert found is not None
    return found.working_bytes


async def test_what_nobody_could_give_takes_nobody_away(world: World) -> None:
    """A request that asks for more than its device has fails alone: none is evicted, and nothing is learned of the model."""
    async with world.host() as run:
        await ready(run, "b", "a")
        facts = {"model": "a", "neededBytes": str(1 << 60)}
        error = ModelhostError(Reason.OUT_OF_DEVICE_MEMORY, "no room", facts)
        run.workers.infer_errors["a"] = error
        with pytest.raises(ModelhostError):
            await run.infer("a", DEADLINE_S)
        assert set(run.workers.resident) == {"a", "b"}
        assert run.host.occupancy.ledger.held("sim-0", "a") == 300
        assert run.host.residency.loads.plan("a")[1] == 300


async def test_requests_that_fail_together_are_one_lesson(world: World) -> None:
    """For two requests that lack memory at the same time one model goes, and what they lacked is reserved once."""
    async with world.host() as run:
        await ready(run, "b", "c", "a")
        short(run, 2)
        requests = [run.infer("a", DEADLINE_S) for _ in range(2)]
        for request in requests:
            assert await request == b"x"
        assert set(run.workers.resident) == {"c", "a"}
        found = run.host.registry.decided.instance_of("a")
        assert found is not None
        assert run.host.occupancy.ledger.held("sim-0", "a") == 300 + found.working_bytes


async def test_it_never_grows_above_what_can_be_had(world: World) -> None:
    """However often its requests find too little memory, a model is not refused for what it is taken to need."""
    async with world.host() as run:
        await ready(run, "b", "a")
        short(run, 100)
        for _ in range(20):
            with pytest.raises(ModelhostError):
                await run.infer("a", DEADLINE_S)
            assert run.host.occupancy.ledger.used("sim-0") <= 1000
        await run.end(await run.host.residency.unload("a"))
        await run.load("b")
        await run.host.models.pin("b", pinned=True)
        await run.load("a")
        assert run.host.occupancy.ledger.held("sim-0", "a") == 550


async def test_it_is_repeated_once(world: World) -> None:
    """What finds too little memory again is refused with its type; nobody else has to go for it."""
    async with world.host() as run:
        await ready(run, "b", "c", "a")
        asked = short(run, 2)
        with pytest.raises(ModelhostError) as caught:
            await run.infer("a", DEADLINE_S)
        assert caught.value.reason is Reason.OUT_OF_DEVICE_MEMORY
        assert asked == ["a", "a"]
        assert set(run.workers.resident) == {"c", "a"}
        assert run.host.inference.in_flight == 0
        route = run.host.routes.get("a")
        assert route is not None
        assert route.in_flight == 0


async def test_where_nobody_can_go_it_is_refused_at_once(world: World) -> None:
    """With nothing idle beside it on the device a request is not repeated."""
    async with world.host() as run:
        await ready(run, "b", "a")
        await run.host.models.pin("b", pinned=True)
        asked = short(run, 1)
        with pytest.raises(ModelhostError):
            await run.infer("a", DEADLINE_S)
        assert asked == ["a"]
        assert set(run.workers.resident) == {"a", "b"}


async def test_it_is_told_when_to_repeat_where_that_may_help(world: World) -> None:
    """Beside a model that is busy: later there may be more. Beside pins alone, or for what no device has: no word of it."""
    async with world.host() as run:
        await ready(run, "b", "a")
        gate = run.workers.infer_gate("b")
        gate.close()
        busy = run.infer("b")
        await gate.reached()

        async def delay(**facts: str) -> float | None:
            told = {"model": "a", **facts}
            error = ModelhostError(Reason.OUT_OF_DEVICE_MEMORY, "no room", told)
            run.workers.infer_errors["a"] = error
            with pytest.raises(ModelhostError) as caught:
                await run.infer("a", DEADLINE_S)
            return caught.value.retry_delay_s

        assert await delay() == RETRY_S
        assert await delay(neededBytes="5000") is None
        gate.open()
        assert await busy == b"x"
        await run.host.models.pin("b", pinned=True)
        assert await delay() is None


async def test_a_load_that_lacked_memory_is_told_when_to_repeat_it(world: World) -> None:
    """While another holds memory of the device that it may give back; alone there, it is told nothing."""
    async with world.host() as run:
        await ready(run, "b")
        lease = await run.host.leases.acquire("b", 60.0)
        await run.have("a", 300)
        for delay in (RETRY_S, None):
            facts = {"model": "a"}
            lack = ModelhostError(Reason.OUT_OF_DEVICE_MEMORY, "no room", facts)
            run.workers.load_errors["a"] = lack
            done = await run.failed(await run.host.residency.load("a"))
            assert done.error is not None
            assert (done.error.reason, done.error.retry_delay_s) == (lack.reason, delay)
            await run.host.leases.release(lease.id)  # twice: that is harmless
            await run.end(await run.host.residency.unload("b"))


async def test_what_it_is_repeated_on_may_be_another_instance(world: World) -> None:
    """An unload that comes while others make room does not wait for the request, which then waits for the next load."""
    async with world.host() as run:
        await ready(run, "b", "c", "a")
        asked = short(run, 1)
        gate = run.workers.unload_gate("b")
        gate.close()
        request = run.infer("a", 20.0)
        await gate.reached()
        unload = await run.host.residency.unload("a")
        await settle()
        gate.open()
        await run.end(unload)
        assert await request == b"x"
        assert asked == ["a", "a"]


async def test_who_came_just_now_stays(world: World) -> None:
    """What ``min_residency`` still keeps safe from eviction does not go for a request either: who may go next goes."""
    async with world.host() as run:
        await ready(run, "b", "c", "a")
        await run.host.update_settings(Settings(min_residency_s=2.5), ["min_residency_s"])
        run.host.routes.get("b").last_used = world.clock.monotonic()  # type: ignore[union-attr]
        short(run, 1)
        assert await run.infer("a", DEADLINE_S) == b"x"
        assert set(run.workers.resident) == {"c", "a"}
        short(run, 1)
        with pytest.raises(ModelhostError):
            await run.infer("a", DEADLINE_S)
        assert set(run.workers.resident) == {"c", "a"}
