"""Devices as a test says they are."""

from collections.abc import Sequence

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.ports import DeviceFacts

GIB = 2**30

CPU = DeviceFacts(id="cpu", kind="CPU", display_name="Fake CPU", uuid="cpu", total_bytes=16 * GIB)


def sim(index: int = 0, total_bytes: int = 4 * GIB) -> DeviceFacts:
    """Return the facts of a simulated device."""
    return DeviceFacts(
        id=f"sim-{index}",
        kind="SIM",
        display_name=f"Simulated device {index}",
        uuid=f"sim-{index}",
        total_bytes=total_bytes,
    )


def cuda(index: int = 0, total_bytes: int = 24 * GIB) -> DeviceFacts:
    """Return the facts of a GPU that is not there."""
    return DeviceFacts(
        id=f"cuda-{index}",
        kind="CUDA",
        display_name=f"Fake GPU {index}",
        uuid=f"GPU-00000000-0000-0000-0000-{index:012d}",
        total_bytes=total_bytes,
        compute_capability="8.9",
        driver_version="570.00",
    )


class FakeDevices:
    """A :class:`modelhostd.ports.Devices` with settable devices and foreign use."""

    def __init__(self, *devices: DeviceFacts) -> None:
        self.devices: list[DeviceFacts] = list(devices) or [CPU]
        self.foreign: dict[str, int] = {}
        """Bytes that other processes use, by device."""
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        """Every call of foreign_bytes: device and own process ids."""

    async def discover(self) -> Sequence[DeviceFacts]:
        """Return the devices given."""
        return tuple(self.devices)

    async def foreign_bytes(self, device: str, own_pids: Sequence[int]) -> int:
        """Return what ``foreign`` says of a device, 0 if nothing."""
        if all(facts.id != device for facts in self.devices):
            raise ModelhostError(
                Reason.DEVICE_NOT_FOUND,
                f"devices/{device} does not exist; there are "
                + ", ".join(facts.id for facts in self.devices),
                {"device": f"devices/{device}"},
            )
        self.asked.append((device, tuple(own_pids)))
        return self.foreign.get(device, 0)
