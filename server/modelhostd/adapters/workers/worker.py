"""One worker process from the daemon's side, from its start until it is reaped."""

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Coroutine

from modelhostd.adapters import memory
from modelhostd.adapters.workers import errors
from modelhostd.adapters.workers import process as processes
from modelhostd.adapters.workers.arenas import Arenas
from modelhostd.adapters.workers.calls import Calls
from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.adapters.workers.control import Control
from modelhostd.adapters.workers.images import ImageMemory, Leavings
from modelhostd.adapters.workers.instances import Instances
from modelhostd.adapters.workers.liveness import Hang, Liveness
from modelhostd.adapters.workers.pace import Pace
from modelhostd.adapters.workers.streams import FrameStream, StderrTail
from modelhostd.core.errors import ModelhostError
from modelhostd.ports import InferReply, LoadSpec, WorkerExit
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.blackbox import PAGE_BYTES, BlackBox, blame
from modelhostd.worker.wire.frames import Frame, Kind, ProtocolError

log = logging.getLogger("modelhostd.workers")

LAST_WORDS_S = 0.25
"""After a death, how long its sockets and pipe may take to end. They end with the process, unless it
left a child behind that holds them; until then nobody is told of the death."""

UNASKED = {
    Kind.HEARTBEAT: "heartbeats",
    Kind.LOAD_PROGRESS: "load progress",
    Kind.KEPT: "images",
}
UNASKED_RATE = 200.0
UNASKED_BURST = 1000.0
"""Frames that answer nothing, a second and at once. A worker sends a beat a second and a few reports for each
load; what a daemon that stood still finds in a full socket is under 300. Without a limit a flood of them took other
clients' requests from 0.7 to 119 ms."""


class Worker:
    """A worker process: ``launch`` it, ``greet`` it, use it and its ``instances``; ``exited`` resolves when it is reaped.

    ``ready`` = takes commands now; ``was_ready`` = it once did; ``stopping`` = its end was asked for; ``for_memory`` = it was,
    or may have been, killed for memory.
    """

    def __init__(
        self, config: WorkersConfig, device: str, images: ImageMemory, model: str = ""
    ) -> None:
        """Prepare a worker of ``device``, for all its models or for ``model`` alone."""
        self._config = config
        self._images = images
        self.leavings = Leavings()
        self.model = model
        self._loop = asyncio.get_running_loop()
        self.device = device
        self.ready = False
        self.was_ready = False
        self.stopping = False
        self.started_at = self._loop.time()
        self.for_memory = False
        self.exited: asyncio.Future[WorkerExit] = self._loop.create_future()
        self.libraries: dict[str, str] = {}
        self._control = Control(self._beat, self.leavings.told)
        self.instances = Instances(config, device, self._control, self.leavings, self._hung)
        self._oom_kills: int | None = None
        self._unasked = Pace(UNASKED_RATE, UNASKED_BURST, self._loop.time())
        self._liveness = Liveness(config.hang_timeout_s, self._loop.time())
        self._hang: Hang | None = None
        self._verdict = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._process: processes.Process | None = None
        self._arenas: Arenas
        self._calls: Calls
        self._stderr: StderrTail
        self._box: BlackBox
        self._filled: asyncio.Future[None]

    @property
    def pid(self) -> int:
        """Process id; 0 before the start."""
        return 0 if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        """Whether there is a process that is not reaped."""
        return self._process is not None and not self.exited.done()

    @property
    def in_flight(self) -> int:
        """Requests without a final frame, abandoned ones included."""
        return self._calls.count

    @property
    def slots_taken(self) -> int:
        """Slots of the request arena in use."""
        return self._calls.slots_taken

    async def launch(self) -> None:
        """Start the process. Raises WORKER_LOST, with nothing started, where the system refuses."""
        try:
            await self._launch()
        except OSError as error:
            raise errors.lost(self.device, "", f"could not be started: {error.strerror}") from error

    async def greet(self) -> None:
        """Wait until the worker has imported its libraries. Raises WORKER_LOST; it is then killed."""
        timeout_s = self._config.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._filled)
                self._calls.begin()
                await self._images.settled()
                self.leavings.inherit(self._images.kept)
                reply = await self._control.hello(self._config, self.device, self._images.kept)
        except TimeoutError:  # is an OSError, too
            raise self._unfit(f"not ready {timeout_s:g} s after its start") from None
        except OSError as error:
            raise self._unfit(f"got no memory for its arenas: {error.strerror}") from None
        except asyncio.CancelledError:
            self.kill("not wanted any more")
            raise
        if reply.protocol_version != frames.PROTOCOL_VERSION:
            raise self._unfit(
                f"speaks version {reply.protocol_version} of the worker protocol, the daemon "
                f"{frames.PROTOCOL_VERSION}; restart the daemon"
            )
        for name, why in reply.unavailable.items():
            log.warning("backend %s is not available on %s: %s", name, self.device, why)
        self.libraries = dict(reply.libraries)
        self.ready = self.was_ready = True
        self._liveness = Liveness(self._config.hang_timeout_s, self._loop.time())
        self._watch = self._loop.call_later(self._config.heartbeat_interval_s, self._look)

    def infer(
        self, spec: LoadSpec, name: str, payload: bytes, timeout_s: float | None, priority: int
    ) -> "asyncio.Future[InferReply]":
        """Send one request now."""
        return self._calls.infer(spec, name or spec.model, payload, timeout_s, priority)

    def stream_infer(
        self, spec: LoadSpec, name: str, payload: bytes, timeout_s: float | None, priority: int
    ) -> AsyncGenerator[InferReply, None]:
        """Send one request when first asked for a response; yield them one by one."""
        return self._calls.stream_infer(spec, name or spec.model, payload, timeout_s, priority)

    def abort(self, generation: int) -> None:
        """End what is in flight in an instance with CANCELLED."""
        self._calls.abort(generation)

    def terminate(self) -> None:
        """Ask the worker to finish what it has and end. What it ends with is then no surprise."""
        self.stopping = True
        self.ready = False
        self._signal(signal.SIGTERM)

    def kill(self, sentence: str) -> None:
        """End the worker at once; ``sentence`` is what its exit is reported as."""
        self._verdict = self._verdict or sentence
        self.ready = False
        self._signal(signal.SIGKILL)

    # --- inside ---------------------------------------------------------------------------------

    async def _launch(self) -> None:
        size = self._config.arena_bytes
        self._arenas = arenas = Arenas(self.device, size)
        try:
            fds = arenas.requests.fd, arenas.responses.fd, self._images.open()
            process = processes.start(self._config, *fds)
        except BaseException:
            arenas.close()
            raise
        self._process = process
        self._oom_kills = memory.oom_kills()
        # Beside the interpreter's start: it may take 0.2 s, and the worker maps them when greeted.
        self._filled = self._loop.run_in_executor(None, arenas.fill)
        self._box = BlackBox(arenas.responses.memory.view(size, PAGE_BYTES))
        self._stderr = StderrTail(f"{self.device} worker {process.pid}")
        self._calls = Calls(
            self._config,
            self.device,
            arenas,
            lambda request: self._control.cancel(request, command=False),
        )
        self._control.stream = FrameStream(
            frames.CONTROL_FROM_WORKER, self._take_control, self._lost
        )
        self._calls.stream = FrameStream(
            frames.DATA_FROM_WORKER, self._calls.take, self._lost, self._calls.pump
        )
        self._loop.add_reader(process.pidfd, self._look_for_death)
        # Once begun it is finished: the process runs, and its end is noticed by what is connected.
        await asyncio.shield(self._own(self._connect(process)))

    async def _connect(self, process: processes.Process) -> None:
        connect = self._loop.create_unix_connection
        await connect(lambda: self._control.stream, sock=process.control)
        await connect(lambda: self._calls.stream, sock=process.data)
        await self._loop.connect_read_pipe(lambda: self._stderr, process.open_stderr())

    def _unfit(self, sentence: str) -> ModelhostError:
        self.kill(sentence)
        return errors.lost(self.device, "", sentence)

    async def _hung(self, sentence: str) -> None:
        self.kill(sentence)
        await asyncio.wait((self.exited,))

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.kill(number)

    def _take_control(self, frame: Frame) -> None:
        kind = UNASKED.get(Kind(frame.kind))
        if kind is not None and not self._unasked.passes(self._loop.time()):
            raise ProtocolError(f"a flood of {kind}")
        self._control.take(frame)

    def _beat(self, header: worker_pb2.HeartbeatHeader) -> None:
        self._liveness.beat(header.threads, self._loop.time())

    def _look(self) -> None:
        """Look for a hang, twice: where this loop itself stood still, beats may still be unread."""
        hang = self._liveness.hang(self._loop.time())
        if hang is not None and self._hang is not None:
            self._own(self._escalate(hang))
            return
        self._hang = hang
        self._watch = self._loop.call_later(self._config.heartbeat_interval_s, self._look)

    async def _escalate(self, hang: Hang) -> None:
        log.error("the worker of %s %s; it is ended", self.device, hang.sentence)
        self._signal(signal.SIGUSR1)
        await asyncio.wait((self.exited,), timeout=self._config.escalation_s)
        if self._liveness.hang(self._loop.time()) is None:
            log.warning("the worker of %s gets on again", self.device)
            self._hang = None
            self._look()
            return
        self.ready = False
        self._hang = hang
        self._verdict = self._verdict or hang.sentence
        self._signal(signal.SIGABRT)
        await asyncio.wait((self.exited,), timeout=self._config.escalation_s)
        self.kill(hang.sentence)

    def _lost(self, error: Exception | None) -> None:
        if isinstance(error, ProtocolError):
            self.kill(f"broke the worker protocol: {error}")
        elif not self.stopping:
            # It is dying, or it closed a socket and lives: then nothing can be had from it any more.
            self._loop.call_later(LAST_WORDS_S, self._end_mute)

    def _end_mute(self) -> None:
        if self._process is not None and self._process.pidfd >= 0:
            self.kill("closed a socket and went on")

    def _look_for_death(self) -> None:
        assert self._process is not None
        how = self._process.reap()
        if how is not None:
            self._loop.remove_reader(self._process.pidfd)
            self._process.close()
            self.ready = False
            self._note_memory(how)
            self._own(self._bury(how))

    def _note_memory(self, how: str) -> None:
        """Leave no image behind where the worker was, or may have been, killed for memory: it has to come back."""
        if how != "signal SIGKILL" or self._verdict or self.stopping:
            return
        kills = memory.oom_kills()
        if kills is None or kills != self._oom_kills:
            log.warning("the worker of %s may have been killed for memory", self.device)
            self.for_memory = True

    async def _bury(self, how: str) -> None:
        """Take what the dead had still said, then fail what was in flight and let go of everything."""
        streams = (self._control.stream.closed, self._calls.stream.closed, self._stderr.closed)
        await asyncio.wait(streams, timeout=LAST_WORDS_S)
        self._control.stream.abort()
        self._calls.stream.abort()
        self._stderr.close()
        if self._watch is not None:
            self._watch.cancel()
        tail = self._stderr.text()
        blamed = self._hang.model if self._hang is not None else ""
        blamed = blamed or blame(self._box.read(), tail)
        end = WorkerExit(self.device, self.pid, self._verdict or how, blamed, tail, self.model)

        def failure(model: str) -> ModelhostError:
            if self.stopping:
                return errors.shutting_down()
            return errors.lost(self.device, model, end.exit)

        self._control.fail_all(failure)
        self._calls.fail_all(failure)
        self._box.release()
        self.exited.set_result(end)
        # In a thread: it takes up to a second per GiB, and nobody waits for it.
        await self._loop.run_in_executor(None, self._arenas.close)

    def _own(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
