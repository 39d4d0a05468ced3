"""Budgets that are refused: below what pins and leases hold, out of range, by whatever way they come."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Settings
from modelhostd.host import HostConfig
from tests.fakes.clock import settle
from tests.host.support import Running, World


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_budget_below_what_is_held_is_refused(world: World) -> None:
    """Below pins and leases nothing changes and nobody goes; the numbers that the error has are enough."""
    async with world.host() as run:
        for model in "ab":
            await run.have(model, 300)
            await run.load(model)
        await run.host.models.pin("a", pinned=True)
        lease = await run.host.leases.acquire("b", 60.0)
        error = await _refused(run, 599)
        assert error.metadata == {
            "device": "sim-0",
            "budgetBytes": "599",
            "neededBytes": "600",
            "heldBy": "a,b",
        }
        assert "a (300, pinned), b (300, leased)" in error.message
        await world.clock.advance(10.0)
        assert set(run.workers.resident) == {"a", "b"}
        assert run.host.registry.decided.devices["sim-0"].budget_bytes == 1000
        assert "BUDGET_CHANGED" not in run.reasons("devices")
        await run.host.residency.set_budget("sim-0", 600)
        await run.host.leases.release(lease.id)
        assert (await _refused(run, 299)).metadata["neededBytes"] == "300"
        await run.host.residency.set_budget("sim-0", 300)
        await world.clock.advance(1.0)
        assert set(run.workers.resident) == {"a"}
        await run.host.models.pin("a", pinned=False)
        await run.host.residency.set_budget("sim-0", 299)
        await world.clock.advance(1.0)
        assert not run.workers.resident


async def test_a_load_of_a_pinned_model_holds_its_bytes(world: World) -> None:
    """What is reserved for a pinned model that loads is as little given back as what one has that is loaded."""
    async with world.host() as run:
        await run.have("a")
        await run.host.models.pin("a", pinned=True)
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.residency.load("a")
        await gate.reached()
        assert (await _refused(run, 399)).metadata["neededBytes"] == "400"
        await run.host.residency.set_budget("sim-0", 400)
        gate.open()
        await run.end(operation)
        assert set(run.workers.resident) == {"a"}


async def test_the_default_below_what_is_held_is_refused_too(world: World) -> None:
    """None is the default, refused like any other budget; one that is not smaller than it was never is."""
    async with world.host(budget=500) as run:
        await run.host.residency.set_budget("sim-0", 1000)
        for model in "ab":
            await run.have(model, 300)
            await run.load(model)
            await run.host.models.pin(model, pinned=True)
        error = await _refused(run, None)
        assert (error.metadata["budgetBytes"], error.metadata["neededBytes"]) == ("500", "600")
        await run.host.residency.set_budget("sim-0", 1000)
        await run.host.models.pin("a", pinned=False)
        assert (await run.host.residency.set_budget("sim-0", None)).budget_bytes == 500


@pytest.mark.parametrize("size", [0, -1, 10_001])
async def test_a_budget_out_of_range_names_the_field(world: World, size: int) -> None:
    """Nothing, less and more than there is are no budgets: 0 is not the way back to the default."""
    async with world.host() as run:
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.set_budget("sim-0", size)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert caught.value.metadata["field"] == "device.budget_bytes"
        assert run.host.registry.decided.devices["sim-0"].budget_bytes == 1000


@pytest.mark.parametrize("how", ["pin", "lease"])
async def test_what_is_to_go_for_a_budget_cannot_be_held(world: World, how: str) -> None:
    """A busy model above the budget is neither pinned nor leased: its device would stay above it for good."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.infer_gate("a")
        gate.close()
        request = run.infer("a")
        await gate.reached()
        await run.host.residency.set_budget("sim-0", 399)
        with pytest.raises(ModelhostError) as caught:
            if how == "pin":
                await run.host.models.pin("a", pinned=True)
            else:
                await run.host.leases.acquire("a", 60.0)
        assert caught.value.reason is Reason.OUT_OF_DEVICE_MEMORY
        assert caught.value.metadata["neededBytes"] == "400"
        gate.open()
        await request
        await world.clock.advance(1.0)
        assert not run.workers.resident


async def test_host_memory_below_what_is_held_is_refused(world: World) -> None:
    """The budget of host memory is not set below the copies of pinned models; other settings are none of its business."""
    async with world.host(budget=400, host_budget=2000) as run:
        for model in "ab":
            await run.have(model)
            await run.load(model)
        await run.end(await run.host.residency.unload("b", keep_warm=True))
        await run.host.models.pin("b", pinned=True)
        less = Settings(host_budget_bytes=399, queue_limit=7)
        with pytest.raises(ModelhostError) as caught:
            await run.host.update_settings(less, ["host_budget_bytes", "queue_limit"])
        assert caught.value.reason is Reason.BUDGET_TOO_SMALL
        assert caught.value.metadata["device"] == "host"
        assert caught.value.metadata["heldBy"] == "b"
        assert "host memory" in caught.value.message
        assert run.host.registry.decided.settings.queue_limit == 256
        await run.host.update_settings(less, ["queue_limit"])
        await run.host.update_settings(replace(less, host_budget_bytes=400), ["host_budget_bytes"])
        await world.clock.advance(1.0)
        assert "b" in run.workers.warm


async def test_a_configuration_read_again_keeps_what_it_can(world: World) -> None:
    """A budget that is refused stays as it was and is told of; the others, and the settings, are taken up."""
    async with world.host(devices=2, host_budget=2000) as run:
        await run.have("a")
        await run.load("a")
        await run.host.models.pin("a", pinned=True)
        await run.have("b")
        await run.host.residency.load("b", device="sim-1")
        await settle()
        await run.end(await run.host.residency.unload("b", keep_warm=True))
        await run.host.models.pin("b", pinned=True)
        found = HostConfig(
            budgets={"sim-0": 399, "sim-1": 800, "sim-7": 5},
            settings_over=lambda stored: replace(stored, host_budget_bytes=1, queue_limit=7),
        )
        refused = await run.host.reconfigure(found)
        assert [e.metadata["device"] for e in refused] == ["host", "sim-0"]
        decided = run.host.registry.decided
        assert [decided.devices[d].budget_bytes for d in ("sim-0", "sim-1")] == [1000, 800]
        assert (decided.settings.host_budget_bytes, decided.settings.queue_limit) == (None, 7)
        # What is configured now is what the default is, from now on.
        await run.host.residency.set_budget("sim-1", 900)
        assert (await run.host.residency.set_budget("sim-1", None)).budget_bytes == 800
        assert (await _refused(run, None)).metadata["budgetBytes"] == "399"


async def _refused(run: Running, size: int | None) -> ModelhostError:
    """Return why a budget of the first device is refused."""
    with pytest.raises(ModelhostError) as caught:
        await run.host.residency.set_budget("sim-0", size)
    assert caught.value.reason is Reason.BUDGET_TOO_SMALL
    return caught.value
