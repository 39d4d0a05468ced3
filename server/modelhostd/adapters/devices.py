"""The devices of this machine: its CPU, its GPUs, and a simulated one where it is asked for."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from modelhostd.adapters import memory
from modelhostd.adapters.nvml import Gpu, Nvml, visible
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import DeviceKind
from modelhostd.ports import DeviceFacts

T = TypeVar("T")

DRIVER_TIMEOUT_S = 10.0
"""A driver that has hung must not hang the daemon's start."""


class MachineDevices:
    """A :class:`modelhostd.ports.Devices`: ``cpu``, ``cuda-N`` and, with ``sim_bytes``, ``sim-0``.

    The N of a GPU is its place in the driver's list; a worker is bound to it by UUID.
    """

    def __init__(
        self,
        sim_bytes: int = 0,
        *,
        nvml: Nvml | None = None,
        root: Path = Path("/"),
        environment: Mapping[str, str] = os.environ,
        driver_timeout_s: float = DRIVER_TIMEOUT_S,
    ) -> None:
        self._sim_bytes = sim_bytes
        self._nvml = nvml or Nvml()
        self._root = root
        self._environment = environment
        self._driver_timeout_s = driver_timeout_s
        self._driver = asyncio.Lock()
        self._found: dict[str, DeviceFacts] = {}

    async def discover(self) -> Sequence[DeviceFacts]:
        """Return the devices; ``cpu`` is first. A driver that does not answer has no GPUs."""
        found = [self._cpu()]
        try:
            gpus = await self._ask_driver(self._nvml.gpus)
        except TimeoutError:
            gpus = []
        found += [_cuda(index, gpu) for index, gpu in visible(gpus, self._environment).items()]
        if self._sim_bytes:
            found.append(
                DeviceFacts(
                    id="sim-0",
                    kind=DeviceKind.SIM.value,
                    display_name="simulated device",
                    uuid="sim-0",
                    total_bytes=self._sim_bytes,
                )
            )
        self._found = {facts.id: facts for facts in found}
        return tuple(found)

    async def foreign_bytes(self, device: str, own_pids: Sequence[int]) -> int:
        """Return bytes that others use; this process counts as ours. Raises DEVICE_NOT_FOUND."""
        facts = self._found.get(device)
        if facts is None:
            known = ", ".join(self._found) or "none yet"
            raise ModelhostError(
                Reason.DEVICE_NOT_FOUND,
                f"device '{device}' is not known here; there are: {known}",
                {"device": device},
            )
        own = {*own_pids, os.getpid()}
        if facts.kind == DeviceKind.CPU.value:
            now = memory.read(self._root)
            used = now.total_bytes - now.available_bytes
            return max(0, used - memory.resident_bytes(own, self._root))
        if facts.kind == DeviceKind.CUDA.value:
            with contextlib.suppress(TimeoutError):
                return await self._ask_driver(lambda: self._nvml.foreign_bytes(facts.uuid, own))
        return 0

    def _cpu(self) -> DeviceFacts:
        return DeviceFacts(
            id="cpu",
            kind=DeviceKind.CPU.value,
            display_name=memory.processor_name(self._root),
            uuid="cpu",
            total_bytes=memory.read(self._root).total_bytes,
        )

    async def _ask_driver(self, question: Callable[[], T]) -> T:
        """Ask in a thread of its own, one question at a time. Raises TimeoutError.

        Not in the loop's executor: a thread that hangs in the driver would hold up the exit.
        """
        async with asyncio.timeout(self._driver_timeout_s):
            await self._driver.acquire()
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[T] = loop.create_future()

            def settle(result: T | None, error: BaseException | None) -> None:
                self._driver.release()
                if answer.done():
                    return
                if error is None:
                    answer.set_result(result)  # type: ignore[arg-type]
                else:
                    answer.set_exception(error)

            def run() -> None:
                result, error = None, None
                try:
                    result = question()
                except BaseException as raised:
                    error = raised
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(settle, result, error)

            threading.Thread(target=run, name="modelhost-nvml", daemon=True).start()
            return await answer


def _cuda(index: int, gpu: Gpu) -> DeviceFacts:
    return DeviceFacts(
        id=f"cuda-{index}",
        kind=DeviceKind.CUDA.value,
        display_name=gpu.name,
        uuid=gpu.uuid,
        total_bytes=gpu.total_bytes,
        compute_capability=gpu.compute_capability,
        driver_version=gpu.driver_version,
    )
