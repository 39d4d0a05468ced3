"""What other processes use of the devices: it shrinks what models may take, before it surprises them."""

import asyncio

import structlog

from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import DeviceKind
from modelhostd.host.occupancy import Occupancy
from modelhostd.ports import Devices

log = structlog.get_logger(__name__)

POLL_S = 2.0
ASK_TIMEOUT_S = 5.0


class ForeignUse:
    """Asks for every device's foreign bytes, again and again; what cannot be told stays as it was."""

    def __init__(self, occupancy: Occupancy, devices: Devices) -> None:
        self._occupancy = occupancy
        self._devices = devices
        self._silent: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask once, so that the first load knows, and go on asking."""
        await self.poll()
        self._task = asyncio.create_task(self._run(), name="foreign use")

    async def stop(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def poll(self) -> None:
        """Ask for every device once."""
        own = tuple(self._occupancy.workers.pids())
        for device in list(self._occupancy.registry.committed.devices):
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    used = await self._devices.foreign_bytes(device, own)
            except (ModelhostError, TimeoutError) as error:
                if device not in self._silent:
                    self._silent.add(device)
                    log.warning("foreign use is not known", device=device, error=str(error))
                continue
            self._silent.discard(device)
            if self._occupancy.registry.committed.devices[device].kind is DeviceKind.CPU:
                # In the ledger, and in no process's resident memory.
                used = max(0, used - self._occupancy.workers.unowned_bytes())
            self._occupancy.foreign[device] = used

    async def _run(self) -> None:
        clock = self._occupancy.registry.clock
        while True:
            await clock.sleep(POLL_S)
            try:
                await self.poll()
            except Exception:
                log.exception("asking for foreign use failed")
