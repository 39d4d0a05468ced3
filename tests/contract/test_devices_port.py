"""What every implementation of the devices port does: the machine's and the fake's."""

from collections.abc import Callable

import pytest

from modelhostd.adapters.devices import MachineDevices
from modelhostd.adapters.nvml import Nvml
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import DeviceKind
from modelhostd.ports import Devices
from tests.fakes.devices import CPU, GIB, FakeDevices, cuda, sim
from tests.fakes.nvml import FakeGpu, FakeLibrary


def system() -> Devices:
    """Return this machine's CPU with two GPUs that are not there, and a simulated device."""
    library = FakeLibrary(FakeGpu("GPU-a"), FakeGpu("GPU-b"))
    return MachineDevices(sim_bytes=GIB, nvml=Nvml(lambda: library), environment={})


def bare() -> Devices:
    """Return the devices of this machine as it is."""
    return MachineDevices()


def fake() -> Devices:
    """Return the fake with the same devices."""
    return FakeDevices(CPU, cuda(0), cuda(1), sim(0, GIB))


@pytest.fixture(params=[system, bare, fake], ids=lambda made: str(made.__name__))
async def devices(request: pytest.FixtureRequest) -> Devices:
    """Return an implementation."""
    make: Callable[[], Devices] = request.param
    return make()


async def test_the_cpu_is_always_there_and_first(devices: Devices) -> None:
    """Every machine has ``cpu``, with its memory."""
    found = await devices.discover()
    assert (found[0].id, found[0].kind, found[0].uuid) == ("cpu", DeviceKind.CPU.value, "cpu")
    assert found[0].total_bytes > 0
    assert found[0].display_name


async def test_ids_and_uuids_are_unique_and_kinds_are_known(devices: Devices) -> None:
    """Ids and UUIDs tell devices apart; a second look finds the same."""
    found = await devices.discover()
    assert len({facts.id for facts in found}) == len({facts.uuid for facts in found}) == len(found)
    for facts in found:
        assert facts.id == "cpu" or facts.id.startswith(f"{DeviceKind(facts.kind).value.lower()}-")
        assert facts.total_bytes > 0
    again = await devices.discover()
    assert [facts.id for facts in again] == [facts.id for facts in found]


async def test_foreign_use_is_a_number_for_every_device(devices: Devices) -> None:
    """Each device that was discovered has a figure, 0 or more."""
    for facts in await devices.discover():
        assert 0 <= await devices.foreign_bytes(facts.id, []) <= facts.total_bytes


async def test_an_unknown_device_is_a_typed_error(devices: Devices) -> None:
    """DEVICE_NOT_FOUND names the device."""
    await devices.discover()
    with pytest.raises(ModelhostError) as caught:
        await devices.foreign_bytes("cuda-77", [])
    assert caught.value.reason is Reason.DEVICE_NOT_FOUND
    assert "cuda-77" in caught.value.metadata["device"]
