"""All worker processes: who holds which instance, and the port that the host uses."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace

from modelhostd.adapters.workers import errors
from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.adapters.workers.ends import to_its_end
from modelhostd.adapters.workers.seat import Seat
from modelhostd.adapters.workers.worker import Worker
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Health, Phase, Progress
from modelhostd.ports import InferReply, Loaded, LoadSpec, WorkerExit, WorkerListener
from modelhostd.worker.wire import frames

REAP_S = 10.0
"""After SIGKILL; longer only where the kernel itself is stuck (a device driver, a dead file system)."""

Key = tuple[str, str, int]


class ProcessWorkers:
    """Implements :class:`modelhostd.ports.Workers` with processes. Make and use it in one loop.

    Beyond the port: ``libraries`` tells what a device's worker runs, ``at_rest`` how much of it could be adopted.
    """

    def __init__(self, config: WorkersConfig) -> None:
        self._config = config
        self._listener: WorkerListener | None = None
        self._seats: dict[tuple[str, str], Seat] = {}
        self._held: dict[Key, tuple[Worker, LoadSpec]] = {}
        self._kept: dict[Key, tuple[Seat, LoadSpec]] = {}
        """What outlived its worker."""
        self._stopping = False

    def set_listener(self, listener: WorkerListener) -> None:
        """Set who is told of starts and of exits that nobody asked for."""
        self._listener = listener

    async def load(self, device: str, spec: LoadSpec, report: Callable[[Progress], None]) -> Loaded:
        """Load an instance; see :meth:`modelhostd.ports.Workers.load`."""
        seat = self._seat(device, spec)
        if seat.worker is None or not seat.worker.ready:
            report(Progress(phase=Phase.STARTING_WORKER, total_bytes=spec.predicted_bytes))
        try:
            worker = await seat.ready()
            loaded = await worker.instances.load(spec, report)
        except BaseException:
            self._end_if_unused(seat)
            raise
        if self._stopping:
            raise errors.shutting_down()
        if not worker.ready:
            raise errors.lost(device, spec.model, "it ended right after the load")
        self._held[device, spec.instance, spec.generation] = worker, spec
        return loaded

    async def unload(self, device: str, instance: str, generation: int) -> None:
        """Free an instance; see :meth:`modelhostd.ports.Workers.unload`."""
        key = device, instance, generation
        if key in self._kept:
            await to_its_end(self._drop(*self._kept.pop(key)))
        elif key in self._held:
            await to_its_end(self._free(*self._held.pop(key)))

    async def demote(self, device: str, instance: str, generation: int) -> int:
        """Take an instance off its device; see :meth:`modelhostd.ports.Workers.demote`."""
        key = device, instance, generation
        if key in self._kept:
            return self._kept_bytes(key)
        return await to_its_end(self._demote(key, *self._held[key])) if key in self._held else 0

    async def drop_copy(self, device: str, instance: str, generation: int) -> int:
        """Give an instance's copy in host RAM back; see :meth:`modelhostd.ports.Workers.drop_copy`."""
        key = device, instance, generation
        if key in self._kept:
            return self._kept_bytes(key)
        worker, _ = self._held.get(key, (None, None))
        if worker is None:
            return 0
        return await to_its_end(worker.instances.drop_copy(instance, generation))

    async def promote(
        self, device: str, instance: str, generation: int, report: Callable[[Progress], None]
    ) -> Loaded:
        """Bring an instance back to its device; see :meth:`modelhostd.ports.Workers.promote`."""
        key = device, instance, generation
        if key in self._kept and not self._stopping:
            return await self._adopt(key, report)
        worker, spec = self._held.get((device, instance, generation), (None, None))
        if worker is None or spec is None or self._stopping:
            raise self._missing(device, instance)
        return await worker.instances.promote(spec, report)

    def infer(
        self,
        device: str,
        instance: str,
        generation: int,
        payload: bytes,
        *,
        timeout_s: float | None,
        priority: int = 0,
        name: str = "",
    ) -> "asyncio.Future[InferReply]":
        """Send one request now; see :meth:`modelhostd.ports.Workers.infer`."""
        held = self._held.get((device, instance, generation))
        if held is None or self._stopping:
            reply: asyncio.Future[InferReply] = asyncio.get_running_loop().create_future()
            reply.set_exception(self._missing(device, instance))
            return reply
        worker, spec = held
        return worker.infer(spec, name, payload, timeout_s, priority)

    def stream_infer(
        self,
        device: str,
        instance: str,
        generation: int,
        payload: bytes,
        *,
        timeout_s: float | None,
        priority: int = 0,
        name: str = "",
    ) -> AsyncGenerator[InferReply, None]:
        """Send one request; see :meth:`modelhostd.ports.Workers.stream_infer`."""
        held = self._held.get((device, instance, generation))
        if held is None or self._stopping:
            raise self._missing(device, instance)
        worker, spec = held
        return worker.stream_infer(spec, name, payload, timeout_s, priority)

    def abort(self, device: str, instance: str, generation: int) -> None:
        """End what is in flight in an instance; see :meth:`modelhostd.ports.Workers.abort`."""
        worker, _ = self._held.get((device, instance, generation), (None, None))
        if worker is not None:
            worker.abort(generation)

    async def check(self, device: str, instance: str, generation: int) -> tuple[Health, str]:
        """Run a health check; see :meth:`modelhostd.ports.Workers.check`."""
        worker, _ = self._held.get((device, instance, generation), (None, None))
        if worker is None:
            return Health.UNHEALTHY, "No worker holds this instance."
        return await worker.instances.check(instance, generation)

    def pids(self) -> Mapping[int, str]:
        """Return worker process id -> device."""
        return {worker.pid: worker.device for worker in self._workers()}

    def unowned_bytes(self) -> int:
        """Return the RAM of what outlived its worker; see :meth:`modelhostd.ports.Workers.unowned_bytes`."""
        return sum(self._kept_bytes(key) for key in self._kept)

    def at_rest(self, device: str) -> int:
        """Return how many of a device's instances would leave an image if their worker ended now."""
        there = (w for w in self._workers() if w.device == device)
        return sum(len(w.leavings.of(self._held_by(w), {})) for w in there)

    def libraries(self, device: str) -> Mapping[str, str]:
        """Return library -> version of the device's worker; empty when none runs."""
        seat = self._seats.get((device, ""))
        return {} if seat is None or seat.worker is None else dict(seat.worker.libraries)

    async def stop(self, timeout_s: float) -> None:
        """End every worker; see :meth:`modelhostd.ports.Workers.stop`."""
        self._stopping = True
        for seat in self._seats.values():
            seat.close()
        workers = self._workers()
        for worker in workers:
            worker.terminate()
        if workers:
            exits = [worker.exited for worker in workers]
            await asyncio.wait(exits, timeout=timeout_s)
            for worker in workers:
                if not worker.exited.done():
                    worker.kill(f"still running {timeout_s:g} s after {signal.SIGTERM.name}")
            await asyncio.wait(exits, timeout=REAP_S)
        self._held.clear()
        self._kept.clear()
        for seat in self._seats.values():
            seat.images.close()
            await seat.images.settled()

    # --- inside ---------------------------------------------------------------------------------

    def _workers(self) -> list[Worker]:
        workers = (seat.worker for seat in self._seats.values())
        return [worker for worker in workers if worker is not None and worker.running]

    def _seat(self, device: str, spec: LoadSpec) -> Seat:
        if self._stopping:
            raise errors.shutting_down()
        key = device, spec.owner
        seat = self._seats.get(key)
        if seat is None:
            seat = Seat(self._config, *key, self._ready, self._exited, self._held_by)
            self._seats[key] = seat
        return seat

    async def _adopt(self, key: Key, report: Callable[[Progress], None]) -> Loaded:
        """Load an instance from what its last worker left."""
        device, instance, generation = key
        seat, spec = self._kept[key]
        if seat.worker is None or not seat.worker.ready:
            report(Progress(phase=Phase.STARTING_WORKER, total_bytes=spec.predicted_bytes))
        worker = await seat.ready()
        image = seat.images.kept.get((instance, generation))
        if self._kept.get(key) != (seat, spec) or image is None:
            raise self._missing(device, instance)
        loaded, wanted = await worker.instances.adopt(spec, image, report)
        if not worker.ready:
            raise errors.lost(device, spec.model, "it ended right after the load")
        del self._kept[key]
        self._held[key] = worker, spec
        seat.images.adopted((instance, generation))
        if not wanted:
            raise asyncio.CancelledError
        return loaded

    async def _free(self, worker: Worker, spec: LoadSpec) -> None:
        await worker.instances.unload(spec.instance, spec.generation)
        await self._end_own(worker, spec)

    async def _demote(self, key: Key, worker: Worker, spec: LoadSpec) -> int:
        kept = await worker.instances.demote(spec.instance, spec.generation)
        if not kept and self._held.pop(key, None) is not None:
            await self._end_own(worker, spec)
        return kept

    async def _drop(self, seat: Seat, spec: LoadSpec) -> None:
        """Free what outlived its worker: by the worker that was told of it, if one was."""
        key = spec.instance, spec.generation
        worker = seat.worker
        if worker is not None and worker.running and key in worker.leavings.inherited:
            seat.images.adopted(key)
            await worker.instances.unload(*key)
        seat.images.drop(key)
        seat.close_images()
        await seat.images.settled()
        if seat.worker is not None:
            await self._end_own(seat.worker, spec)

    def _kept_bytes(self, key: Key) -> int:
        seat, spec = self._kept[key]
        image = seat.images.kept.get((spec.instance, spec.generation))
        return 0 if image is None else image.weights.length

    def _held_by(self, worker: Worker) -> Sequence[frames.Key]:
        """Return the instances of a worker, the last loaded ones first."""
        held = [(i, g) for (_, i, g), (holder, _) in self._held.items() if holder is worker]
        return held[::-1]

    async def _end_own(self, worker: Worker, spec: LoadSpec) -> None:
        """End the process of a model that had its own and is gone from it; returns when it is reaped."""
        seat = self._seats.get((worker.device, spec.owner))
        if seat is not None and seat.model and self._end_if_unused(seat):
            await asyncio.wait((worker.exited,))

    def _end_if_unused(self, seat: Seat) -> bool:
        """End the process of a single model when nothing of it is held any more, of an earlier one neither."""
        worker = seat.worker
        if not seat.model or worker is None:
            return False
        if any(holder is worker for holder, _ in self._held.values()):
            return False
        if any(place is seat for place, _ in self._kept.values()):
            return False  # With its process the memory would go that this is in.
        worker.terminate()
        return True

    def _missing(self, device: str, instance: str) -> ModelhostError:
        if self._stopping:
            return errors.shutting_down()
        running = any(worker.device == device and worker.ready for worker in self._workers())
        if running:
            return errors.not_loaded(instance)
        return errors.lost(device, "", "not running")

    def _ready(self, worker: Worker) -> None:
        if self._listener is not None and not self._stopping:
            self._listener.worker_ready(worker.device, worker.pid)

    def _exited(self, worker: Worker, exit: WorkerExit) -> None:
        seat = self._seats[worker.device, worker.model]
        for key in [key for key, (holder, _) in self._held.items() if holder is worker]:
            _, spec = self._held.pop(key)
            if key[1:] in seat.images.kept:
                self._kept[key] = seat, spec
        for key in [key for key, (place, _) in self._kept.items() if place is seat]:
            if key[1:] not in seat.images.kept:
                del self._kept[key]
        if self._listener is not None and not self._stopping:
            kept = {
                k[1:]: self._kept_bytes(k) for k, (place, _) in self._kept.items() if place is seat
            }
            self._listener.worker_exited(replace(exit, kept=kept))
