"""Budgets and pins that change while models are loaded, wanted or busy; what was measured counts."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import Settings
from tests.fakes.clock import settle
from tests.fakes.devices import FakeDevices
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_pin_takes_a_waiting_load_its_room(world: World) -> None:
    """A load that waits for a busy model is refused when that model is pinned meanwhile."""
    async with world.host(budget=500) as run:
        for model in "ab":
            await run.have(model)
        await run.load("a")
        run.workers.infer_gate("a").close()
        busy = run.infer("a")
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
            await run.host.inference.infer("a", "", b"x", DEADLINE_S)
        assert caught.value.reason is Reason.MODEL_TOO_LARGE
        assert caught.value.metadata["neededBytes"] == "1200"
        await run.host.models.update("a", _fp16)
        run.workers.measured_bytes["a"] = 300
        await run.load("a")


async def test_a_pinned_model_that_takes_too_much_is_unloaded_again(world: World) -> None:
    """Beside what else is pinned, or alone: its load fails with what it took and what was predicted, and no ledger is above its budget."""
    async with world.host() as run:
        await run.have("b", 500)
        await run.load("b")
        await run.host.models.pin("b", pinned=True)
        await run.have("a", 300)
        await run.host.models.pin("a", pinned=True)
        for measured, held_by, delay in ((600, "b", None), (1200, "", None)):
            run.workers.measured_bytes["a"] = measured
            done = await run.failed(await run.host.residency.load("a"))
            assert done.error is not None
            assert done.error.reason == "OUT_OF_DEVICE_MEMORY"
            facts = done.error.metadata
            assert (facts["neededBytes"], facts["predictedBytes"]) == (str(measured), "300")
            assert (facts["heldBy"], done.error.retry_delay_s) == (held_by, delay)
            assert set(run.workers.resident) == ({"b"} if held_by else set())
            assert run.host.occupancy.ledger.held("sim-0", "a") == 0
            with pytest.raises(ModelhostError) as caught:
                await run.host.residency.load("a")
            assert caught.value.metadata["neededBytes"] == str(measured)
            await run.host.models.pin("b", pinned=False)
            await run.end(await run.host.residency.unload("b"))
            run.host.occupancy.learned.forget("a")
        assert run.host.occupancy.ledger.used("sim-0") == 0


async def test_a_pinned_model_stays_where_other_processes_took_the_memory_while_it_loaded(
    world: World,
) -> None:
    """It took what was predicted: that less is there by then is not its doing, as it is not a moment after its load."""
    async with world.host() as run:
        await run.have("a", 300)
        await run.host.models.pin("a", pinned=True)
        run.workers.load_gate("a").close()
        operation = await run.host.residency.load("a")
        await run.workers.load_gate("a").reached()
        run.host.occupancy.foreign["sim-0"] = 1 << 40
        run.workers.load_gate("a").open()
        await run.end(operation)
        assert set(run.workers.resident) == {"a"}


class Once(dict[str, int]):
    """Bytes of which each is measured once."""

    def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
        """Return a size that is not there afterwards."""
        return self.pop(key, default)  # type: ignore[arg-type]


async def test_what_served_before_a_reload_that_takes_too_much_serves_again(world: World) -> None:
    """As where the reload fails for any other reason: a pinned model is not left without an instance."""
    async with world.host() as run:
        await run.have("a", 300)
        await run.load("a")
        await run.host.models.pin("a", pinned=True)
        await run.host.models.update("a", _fp16)
        run.workers.measured_bytes = Once(a=1200)
        done = await run.failed(await run.host.reloads.reload("a"))
        assert done.error is not None
        assert done.error.reason == "OUT_OF_DEVICE_MEMORY"
        await settle()
        assert [verb for verb, *_ in run.workers.log] == ["load", "unload"] * 2 + ["load"]
        assert set(run.workers.resident) == {"a"}
        assert run.host.occupancy.ledger.used("sim-0") == run.workers.device_bytes("sim-0") < 1000


async def test_others_leave_for_a_pinned_model_that_takes_more(world: World) -> None:
    """What is idle goes, as for any budget; the pinned one stays where that is enough."""
    async with world.host() as run:
        await run.have("b", 500)
        await run.load("b")
        await run.have("a", 300)
        await run.host.models.pin("a", pinned=True)
        run.workers.measured_bytes["a"] = 900
        await run.load("a")
        await world.clock.advance(1.0)
        assert set(run.workers.resident) == {"a"}
        assert run.host.occupancy.ledger.used("sim-0") == 900


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


async def test_the_bytes_of_a_device_add_up_before_what_freed_them_is_stored(world: World) -> None:
    """What a device has reserved, resident and free is of one moment, however long a commit takes."""
    async with world.host() as run:
        for model in "ab":
            await run.have(model, 300)
            await run.load(model)
        run.database.hold_commits()
        await run.database.release_commits(1)  # the budget's; that of the eviction waits
        await run.host.residency.set_budget("sim-0", 400)
        await settle()
        device = run.host.live_device(run.host.registry.decided.device("sim-0"))
        await run.database.release_commits()
        assert set(run.workers.resident) == {"b"}
        assert (device.reserved_bytes, device.resident_bytes) == (0, 300)


async def test_a_busy_model_above_the_budget_goes_after_its_requests(world: World) -> None:
    """A model that is never idle is drained once its device was above budget for a while."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.infer_gate("a")
        gate.close()
        request = run.infer("a")
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


async def test_what_can_never_fit_cannot_be_pinned(world: World) -> None:
    """A pin of a model above every budget is refused with the numbers; of one that is not fetched yet it is not."""
    async with world.host() as run:
        await run.have("a", 1001)
        with pytest.raises(ModelhostError) as caught:
            await run.host.models.pin("a", pinned=True)
        assert caught.value.reason is Reason.MODEL_TOO_LARGE
        assert not run.host.models.get("a").pinned
        await run.add("b")
        await run.host.models.pin("b", pinned=True)


async def test_a_failed_budget_change_is_no_change(world: World) -> None:
    """When UpdateDevice cannot be stored the budget stays as it was."""
    async with world.host() as run:
        run.database.fail_commits()
        with pytest.raises(ModelhostError):
            await run.host.residency.set_budget("sim-0", 100)
        assert run.host.registry.decided.devices["sim-0"].budget_bytes == 1000


def _fp16(spec: ModelSpec) -> ModelSpec:
    return replace(spec, config=replace(spec.config, precision="fp16"))


def _take(run: Running, size: int) -> None:
    """Let another process take bytes of the device."""
    devices = run.host.foreign._devices
    assert isinstance(devices, FakeDevices)
    devices.foreign["sim-0"] = size


async def test_what_others_use_shrinks_the_budget(world: World) -> None:
    """Memory that another process takes is taken from idle models, and loads are refused with numbers."""
    async with world.host() as run:
        for model in "ab":
            await run.have(model)
            await run.load(model)
            await world.clock.advance(1.0)
        _take(run, 9_500)
        await world.clock.advance(5.0)
        assert set(run.workers.resident) == {"b"}
        _take(run, 9_900)
        await world.clock.advance(5.0)
        assert not run.workers.resident
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("a")
        assert caught.value.reason is Reason.OUT_OF_DEVICE_MEMORY
        assert "other processes (900)" in caught.value.message
        _take(run, 0)
        await world.clock.advance(5.0)
        await run.load("a")


async def test_the_first_load_knows_what_others_use(world: World) -> None:
    """Foreign use is known before pinned models load; a device that does not tell stays as it was."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        devices = run.host.foreign._devices
        assert isinstance(devices, FakeDevices)
        assert devices.asked[0] == ("sim-0", ())

        async def silent(device: str, own_pids: object) -> int:
            raise ModelhostError(Reason.DEVICE_NOT_FOUND, "no", {"device": device})

        devices.foreign_bytes = silent  # type: ignore[assignment,method-assign]
        await world.clock.advance(5.0)
        assert set(run.workers.resident) == {"a"}


async def test_what_holds_nothing_is_not_evicted_in_vain(world: World) -> None:
    """A model without bytes stays where others take what is pinned: its going would free nothing."""
    async with world.host() as run:
        run.workers.measured_bytes["b"] = 0
        for model in "ab":
            await run.have(model, 300)
            await run.load(model)
        await run.host.models.pin("a", pinned=True)
        _take(run, 9_900)
        await world.clock.advance(10.0)
        assert "OVER_BUDGET" not in run.reasons("instances")
        assert set(run.workers.resident) == {"a", "b"}


async def test_an_eviction_for_a_budget_says_what_stays(world: World) -> None:
    """The event of an eviction for a device's or for host memory's budget names bytes, policy and who is kept."""
    async with world.host(host_budget=2000) as run:
        for model in "abc":
            await run.have(model, 300)
            await run.load(model)
            await world.clock.advance(1.0)
        await run.host.residency.set_budget("sim-0", 700)
        await world.clock.advance(1.0)
        await run.host.update_settings(Settings(host_budget_bytes=600), ["host_budget_bytes"])
        await world.clock.advance(1.0)
        events = run.host.registry.journal._ring.read(1, 10_000) or ()
        told = {e.reason: e.details for e in events if e.reason.startswith("OVER_")}
        same = {"overBytes": "200", "freedBytes": "300", "policy": "lru", "kept": "b,c"}
        assert told["OVER_BUDGET"].items() >= same.items()
        assert told["OVER_HOST_BUDGET"].items() >= (same | {"overBytes": "300"}).items()
