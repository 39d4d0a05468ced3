"""Workers without processes: deterministic, and driven by the test step by step."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Health, Phase, Progress
from modelhostd.ports import (
    InferReply,
    Loaded,
    LoadSpec,
    TensorSpec,
    WorkerExit,
    WorkerListener,
)
from tests.fakes.gates import Gate, first
from tests.fakes.pieces import in_pieces
from tests.fakes.tiers import Process, Tiers
from tests.fakes.worker_errors import aborted, deadline_exceeded, not_loaded, worker_lost

Handler = Callable[[LoadSpec, bytes], bytes]


class FakeWorkers(Tiers):
    """Implements :class:`modelhostd.ports.Workers`.

    Controls, all by model id: ``measured_bytes`` (default: the prediction), ``host_bytes`` (of the image; default: the
    measured ones, 0 on ``cpu``), ``load_s`` (what a load or promotion says that it took), ``load_errors`` and ``promote_errors`` (raised
    by each until removed), ``infer_errors``, ``healths``, ``pieces``, and the gates ``load_gate(model)``, ``unload_gate(model)``, ``demote_gate(model)``,
    ``promote_gate(model)``, ``copy_gate(model)`` (of a copy that is dropped; none is of those in ``stuck``), ``infer_gate(model)``: ``close()`` holds, ``open()`` releases, ``await
    reached(n)`` waits until n callers are held. ``crash(device)`` kills a worker as a signal would.
    What happened is in ``log`` as ``(verb, device, model, generation)``; what is held in ``resident`` and ``warm``;
    ``peak_bytes`` is the most that a device ever held at once. ``leavings`` says what outlives a crash.
    """

    def __init__(self, handler: Handler | None = None) -> None:
        super().__init__()
        self.handler: Handler = handler or (lambda spec, payload: payload)
        self.measured_bytes: dict[str, int] = {}
        self.host_bytes: dict[str, int] = {}
        self.load_errors: dict[str, ModelhostError] = {}
        self.infer_errors: dict[str, ModelhostError] = {}
        self.healths: dict[str, tuple[Health, str]] = {}
        self.inputs: dict[str, tuple[TensorSpec, ...]] = {}
        self.outputs: dict[str, tuple[TensorSpec, ...]] = {}
        self.progress_steps: int = 4
        self.stopped = False
        self._listener: WorkerListener | None = None
        self._next_pid = 4_000_000

    # --- controls -------------------------------------------------------------------------------

    @property
    def resident(self) -> Mapping[str, tuple[str, int]]:
        """Model -> (device, measured bytes) of everything that holds memory now."""
        return {
            spec.model: (process.device, self._bytes[process.device, spec.instance, generation])
            for process in self._processes.values()
            for (_, generation), spec in process.instances.items()
        }

    @property
    def warm(self) -> Mapping[str, tuple[str, int]]:
        """Model -> (device, bytes of its image) of everything that is demoted, or outlived its worker, now."""
        return self.leavings.warm | {
            spec.model: (process.device, process.loaded[key].host_bytes)
            for process in self._processes.values()
            for key, spec in process.warm.items()
        }

    @property
    def image_bytes(self) -> int:
        """Bytes of host RAM that images hold now, those of what is on a device included."""
        loaded = (one for p in self._processes.values() for one in p.loaded.values())
        return self.unowned_bytes() + sum(one.host_bytes for one in loaded)

    def in_flight(self, model: str = "") -> int:
        """Return how many requests (to ``model``, or to all) are not answered yet."""
        names = (name for p in self._processes.values() for name in p.requests.values())
        return sum(model in ("", name) for name in names)

    def crash(
        self,
        device: str,
        *,
        model: str = "",
        exit: str = "signal SIGKILL",
        blamed: str = "",
        stderr_tail: str = "",
        replace: bool = True,
    ) -> None:
        """End the worker of ``device`` (of ``model`` where it has its own) and tell the listener.

        Everything in flight fails with WORKER_LOST before the listener hears of it; with ``replace``
        the listener is told of a new, empty worker in a later turn of the loop.
        """
        process = self._processes.pop((device, model))
        lost = worker_lost(device, exit)
        for load in process.loads:
            load.set_exception(lost)
        for request in list(process.requests):
            if not request.done():
                request.set_exception(lost)
        process.requests.clear()
        for instance, generation in process.instances:
            self._bytes.pop((device, instance, generation), None)
        held = (process.instances | process.warm).items()
        there = {
            (device, *key): (spec, process.loaded[key])
            for key, spec in held
            if key not in process.given_up
        }
        kept = self.leavings.leave(device, model, there)
        self.log.append(("crash", device, model, 0))
        if self._listener is not None:
            told = WorkerExit(device, process.pid, exit, blamed, stderr_tail, model, kept)
            self._listener.worker_exited(told)
        if replace:
            asyncio.get_running_loop().call_soon(self._process, device, model)

    # --- the port -------------------------------------------------------------------------------

    def set_listener(self, listener: WorkerListener) -> None:
        """See :class:`modelhostd.ports.Workers`."""
        self._listener = listener

    async def load(self, device: str, spec: LoadSpec, report: Callable[[Progress], None]) -> Loaded:
        """See :class:`modelhostd.ports.Workers`; reports ``progress_steps`` equal steps."""
        process = self._process(device, spec.owner)
        self.log.append(("load", device, spec.model, spec.generation))
        size = self.measured_bytes.get(spec.model, spec.predicted_bytes)
        key = (device, spec.instance, spec.generation)
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        process.loads.add(lost)
        try:
            if (error := self.load_errors.get(spec.model)) is not None:
                await asyncio.sleep(0)
                raise error
            self._bytes[key] = size
            self.peak_bytes[device] = max(self.peak_bytes.get(device, 0), self.device_bytes(device))
            for step in range(1, self.progress_steps + 1):
                done = size * step // self.progress_steps
                report(Progress(phase=Phase.LOADING, done_bytes=done, total_bytes=size))
                await asyncio.sleep(0)
            await first(self.load_gate(spec.model).wait(), lost)
            report(Progress(phase=Phase.CHECKING, done_bytes=size, total_bytes=size))
        except BaseException:
            self._bytes.pop(key, None)
            raise
        finally:
            process.loads.discard(lost)
            if not lost.cancel() and not lost.cancelled():
                lost.exception()
        process.instances[spec.instance, spec.generation] = spec
        process.known[spec.instance] = spec.model
        image = self.host_bytes.get(spec.model, size) if device != "cpu" else 0
        loaded = process.loaded[spec.instance, spec.generation] = Loaded(
            backend=spec.config.backend or "identity",
            platform="fake",
            measured_bytes=size,
            inputs=self.inputs.get(spec.model, ()),
            outputs=self.outputs.get(spec.model, ()),
            max_batch_size=spec.config.max_batch_size or 0,
            load_s=self.load_s.get(spec.model, 0.0),
            host_bytes=image if spec.keep_image else 0,
            decoupled=spec.model in self.pieces,
        )
        return loaded

    async def unload(self, device: str, instance: str, generation: int) -> None:
        """See :class:`modelhostd.ports.Workers`."""
        if model := self.leavings.model((device, instance, generation)):
            await self.unload_gate(model).wait()
            self.leavings.left.pop((device, instance, generation), None)
            self.log.append(("unload", device, model, generation))
        process, spec = self._find(device, instance, generation, warm=True)
        if process is None or spec is None:
            await asyncio.sleep(0)
            return
        process.instances.pop((instance, generation), None)
        process.warm.pop((instance, generation), None)
        await self.unload_gate(spec.model).wait()
        process.loaded.pop((instance, generation), None)
        self._bytes.pop((device, instance, generation), None)
        self.log.append(("unload", device, spec.model, generation))

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
    ) -> Awaitable[InferReply]:
        """See :class:`modelhostd.ports.Workers`; answers ``handler(spec, payload)``."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[InferReply] = loop.create_future()
        process, spec = self._find(device, instance, generation)
        if process is None:
            reply.set_exception(worker_lost(device, "not running"))
        elif spec is None:
            model = process.known.get(instance, instance)
            reply.set_exception(not_loaded(model))
        elif timeout_s is not None and timeout_s <= 0:
            reply.set_exception(deadline_exceeded(spec.model))
        else:
            process.requests[reply] = spec.model
            reply.add_done_callback(lambda _: process.requests.pop(reply, None))
            self.log.append(("infer", device, spec.model, generation))
            gate = self.infer_gate(spec.model)
            if gate.closed:
                task = loop.create_task(self._answer_later(gate, spec, payload, reply))
                reply.add_done_callback(lambda _: task.cancel())
            else:
                loop.call_soon(self._answer, spec, payload, reply)
        return reply

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
        """See :class:`modelhostd.ports.Workers`; yields ``pieces[model](spec, payload)``, or one answer."""
        infer = self.infer(device, instance, generation, payload, timeout_s=timeout_s)
        return in_pieces(self, infer, self._find(device, instance, generation)[1], payload)

    def abort(self, device: str, instance: str, generation: int) -> None:
        """See :class:`modelhostd.ports.Workers`."""
        process, spec = self._find(device, instance, generation)
        if process is None or spec is None:
            return
        for request, model in list(process.requests.items()):
            if model == spec.model and not request.done():
                request.set_exception(aborted(model))

    async def check(self, device: str, instance: str, generation: int) -> tuple[Health, str]:
        """See :class:`modelhostd.ports.Workers`; answers ``healths[model]``, HEALTHY by default."""
        _, spec = self._find(device, instance, generation)
        await asyncio.sleep(0)
        if spec is None:
            return Health.UNHEALTHY, "The worker does not hold this instance."
        return self.healths.get(spec.model, (Health.HEALTHY, "The canary was answered."))

    def unowned_bytes(self) -> int:
        """See :class:`modelhostd.ports.Workers`."""
        return sum(map(self.leavings.bytes, self.leavings.left))

    def pids(self) -> Mapping[int, str]:
        """See :class:`modelhostd.ports.Workers`."""
        return {process.pid: process.device for process in self._processes.values()}

    async def stop(self, timeout_s: float) -> None:
        """See :class:`modelhostd.ports.Workers`."""
        self.stopped = True
        self._listener = None
        self.leavings.clear()
        for device, model in list(self._processes):
            self.crash(device, model=model, exit="stopped", replace=False)
        await asyncio.sleep(0)

    # --- inside ---------------------------------------------------------------------------------

    def _process(self, device: str, model: str) -> Process:
        process = self._processes.get((device, model))
        if process is None:
            if self.stopped:
                raise ModelhostError(Reason.SHUTTING_DOWN, "The daemon is shutting down.")
            self._next_pid += 1
            process = self._processes[device, model] = Process(device, self._next_pid)
            if self._listener is not None:
                self._listener.worker_ready(device, process.pid)
        return process

    async def _answer_later(
        self, gate: Gate, spec: LoadSpec, payload: bytes, reply: "asyncio.Future[InferReply]"
    ) -> None:
        await gate.wait()
        self._answer(spec, payload, reply)

    def _answer(self, spec: LoadSpec, payload: bytes, reply: "asyncio.Future[InferReply]") -> None:
        if reply.done():
            return
        if spec.model in self.infer_errors:
            reply.set_exception(self.infer_errors[spec.model])
            return
        try:
            answer = self.handler(spec, payload)
        except ModelhostError as error:
            reply.set_exception(error)
            return
        reply.set_result(InferReply(answer, 1, 1, 0, 0, 0, 0))
