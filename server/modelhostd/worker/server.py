"""A worker from the handshake to its end: reads both sockets, hands work to the threads.

Threads: the main one reads control and takes signals, one of two reads data (and runs quick requests), one
beats, a few run inference (executor), one computes on the CPU, and each load and unload has its own.
"""

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time

from google.protobuf.message import DecodeError

from modelhostd.core.values import dataclass
from modelhostd.worker import registry
from modelhostd.worker.channel import Channel, DataChannel
from modelhostd.worker.checks import CheckJob
from modelhostd.worker.executor import Executor, exit_now
from modelhostd.worker.imaging import Imaging
from modelhostd.worker.jobs import InferJob
from modelhostd.worker.keeping import from_hello
from modelhostd.worker.loader import Loader
from modelhostd.worker.own_threads import look_for_lost, start_thread
from modelhostd.worker.readers import Readers, Received
from modelhostd.worker.residents import Residents
from modelhostd.worker.team import one_team
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.arena import EXTENT_BYTES, Arena
from modelhostd.worker.wire.blackbox import PAGE_BYTES, BlackBox
from modelhostd.worker.wire.frames import Frame, Kind, ProtocolError

log = logging.getLogger("modelhostd.worker")

PROTOCOL_EXIT = 76
MAX_ASSEMBLIES = 64
MAX_THREADS = 4


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What a worker inherits."""

    control: int
    data: int
    requests: int
    responses: int
    images: int


class Worker:
    """One worker process."""

    def __init__(self, descriptors: Descriptors) -> None:
        self._descriptors = descriptors
        self._control = Channel(_adopt(descriptors.control), frames.CONTROL_TO_WORKER)
        self._assemblies: dict[int, _Assembly] = {}
        self._readers = Readers(self._wake)
        self._greeted = False
        self._data: DataChannel
        self._requests: Arena
        self._executor: Executor
        self._loader: Loader
        self._residents: Residents
        self._limits: worker_pb2.HelloRequest

    def run(self) -> int:
        """Serve until the daemon closes the control socket; return the exit code."""
        try:
            for frame in self._control.frames():
                if frame.kind == Kind.HELLO:
                    if self._greeted:
                        raise ProtocolError("a second HELLO")
                    hello = worker_pb2.HelloRequest.FromString(frame.header)
                    if not self._greet(hello, frame):
                        return PROTOCOL_EXIT
                    self._greeted = True
                elif self._greeted:
                    self._take_control(frame)
                else:
                    raise ProtocolError("a command before HELLO")
        except (ProtocolError, DecodeError):
            log.exception("the daemon broke the protocol on the control socket")
            return PROTOCOL_EXIT
        except ConnectionError:
            return 0
        return 0

    def _greet(self, hello: worker_pb2.HelloRequest, frame: Frame) -> bool:
        answer = worker_pb2.HelloResponse(protocol_version=frames.PROTOCOL_VERSION, pid=os.getpid())
        same = hello.protocol_version == frames.PROTOCOL_VERSION
        if same:
            found = self._prepare(hello)
            answer.backends.extend(found.backends)
            answer.unavailable.update(found.unavailable)
            answer.libraries.update(found.libraries)
        self._control.send(Kind.HELLO, frames.FINAL, frame.request, 0, answer.SerializeToString())
        return same

    def _prepare(self, hello: worker_pb2.HelloRequest) -> registry.Registry:
        logging.basicConfig(
            level=hello.log_level.upper() or "INFO",
            stream=sys.stderr,
            format="%(levelname)s %(name)s: %(message)s",
        )
        self._limits = hello
        self._requests = _map(self._descriptors.requests, hello.request_arena_bytes, writable=False)
        size = hello.response_arena_bytes
        responses = _map(self._descriptors.responses, size + PAGE_BYTES, writable=True)
        box = BlackBox(responses.view(size, PAGE_BYTES))
        data = _adopt(self._descriptors.data)
        self._data = DataChannel(data, responses, size, hello.max_message_bytes)
        compute_threads = one_team(hello.device)
        found = registry.find((backend.name, backend.target) for backend in hello.backends)
        # What the imports left behind stays for good: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        cores = len(os.sched_getaffinity(0))
        threads = hello.executor_threads or max(2, min(MAX_THREADS, cores))
        self._executor = Executor(threads, hello.queue_limit, box, exit_now, compute_threads)
        os.set_inheritable(self._descriptors.images, False)
        imaging = Imaging(
            hello.device, hello.host_ready_bytes, self._descriptors.images, from_hello(hello)
        )
        self._residents = Residents(hello.device, self._executor, imaging, self._control, box)
        self._loader = Loader(
            hello.device, found, self._executor, self._residents, imaging, self._control, box
        )
        self._await_sigterm()
        self._executor.start()
        start_thread(self._beat, name="beat")
        for index, activity in enumerate(self._executor.readers):
            start_thread(self._read_data, index, name=activity.name)
        return found

    def _take_control(self, frame: Frame) -> None:
        if frame.kind == Kind.LOAD:
            self._loader.load(frame)
        elif frame.kind == Kind.UNLOAD:
            self._residents.unload(frame)
        elif frame.kind == Kind.DEMOTE:
            self._residents.demote(frame)
        elif frame.kind == Kind.PROMOTE:
            self._residents.promote(frame)
        elif frame.kind == Kind.DROP_COPY:
            self._residents.drop_copy(frame)
        elif frame.kind == Kind.CHECK:
            header = worker_pb2.CheckHeader.FromString(frame.header)
            self._executor.submit(
                CheckJob(self._control, frame.request, frame.generation, header.instance)
            )
        elif frame.kind == Kind.CANCEL:
            if worker_pb2.CancelHeader.FromString(frame.header).command:
                self._loader.cancel(frame.request)
                self._residents.cancel(frame.request)
            else:
                self._executor.cancel(frame.request)

    def _read_data(self, index: int) -> None:
        activity = self._executor.readers[index]
        try:
            self._readers.run(index, self._receive, lambda: self._executor.serve(activity))
        except (ProtocolError, DecodeError):
            log.exception("the daemon broke the protocol on the data socket")
            exit_now(PROTOCOL_EXIT)
        except OSError:
            log.debug("the data socket is gone", exc_info=True)

    def _receive(self, *, wait: bool, serves: bool) -> Received:
        """Take what has come on the data socket; ``serves``: the caller runs what is quick."""
        frames_here = self._data.receive(wait=wait)
        if frames_here is None:
            return Received.END
        left = False
        for frame in frames_here:
            if frame.kind == Kind.REQUEST:
                job = self._job(frame)
                if job is not None and self._executor.submit(job, here=serves):
                    left = True
            else:
                credit = worker_pb2.CreditHeader.FromString(frame.header)
                self._data.release(list(credit.slots))
                if credit.response_ready_bytes:
                    self._data.extend(credit.response_ready_bytes)
                if credit.responses:
                    self._executor.add_credit(frame.request, credit.responses)
        return Received.QUICK if left else Received.NOTHING

    def _wake(self) -> None:
        self._executor.wake()

    def _job(self, frame: Frame) -> InferJob | None:
        """Return the request that a frame completes."""
        assembly = self._assemblies.get(frame.request)
        payload: bytes | memoryview
        if assembly is None:
            header = worker_pb2.RequestHeader.FromString(frame.header)
            arrived_ns = time.monotonic_ns()
            if frame.flags & frames.MORE:
                self._assemble(header, arrived_ns, frame)
                return None
            payload = frame.payload
            if frame.flags & frames.ARENA:
                if not self._requests.holds(header.slot_offset, header.slot_length):
                    raise ProtocolError("a request's slot is outside the arena")
                payload = self._requests.view(header.slot_offset, header.slot_length)
        else:
            assembly.add(frame.payload)
            if frame.flags & frames.MORE:
                return None
            header, arrived_ns, payload = assembly.header, assembly.arrived_ns, assembly.whole()
            del self._assemblies[frame.request]
        return InferJob(
            self._data,
            frame.request,
            frame.generation,
            header.instance,
            header.model_name,
            header.priority,
            payload,
            arrived_ns,
            header.deadline_ns or None,
            header.credit,
        )

    def _assemble(self, header: worker_pb2.RequestHeader, arrived_ns: int, frame: Frame) -> None:
        too_many = len(self._assemblies) >= MAX_ASSEMBLIES
        if too_many or not 0 < header.total_length <= self._limits.max_message_bytes:
            raise ProtocolError(f"a request of {header.total_length} bytes in several frames")
        assembly = self._assemblies[frame.request] = _Assembly(header, arrived_ns)
        assembly.add(frame.payload)

    def _beat(self) -> None:
        interval_s = self._limits.heartbeat_interval_ms / 1000
        pause = threading.Event()
        while not pause.wait(interval_s):
            self._executor.look_again()
            look_for_lost(time.monotonic())
            header = worker_pb2.HeartbeatHeader(queued=self._executor.queued)
            activities = (
                *self._executor.activities,
                *self._loader.activities,
                *self._residents.activities,
            )
            for activity in activities:
                header.threads.add(
                    name=activity.name,
                    progress=activity.progress,
                    model=activity.model,
                    loading=activity.loading,
                )
            try:
                self._control.send(Kind.HEARTBEAT, 0, 0, 0, header.SerializeToString())
            except OSError:
                return

    def _await_sigterm(self) -> None:
        """Finish on SIGTERM, whichever thread the kernel gives it to.

        Python runs handlers in the main thread, which may stand in a read that a signal to another
        thread does not end; the byte in the pipe is written where the signal arrives.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)

        def wait() -> None:
            while os.read(read, 1) != bytes([signal.SIGTERM]):
                pass
            self._finish()

        start_thread(wait, name="finish")

    def _finish(self) -> None:
        self._executor.drain()
        exit_now(0)


class _Assembly:
    """A payload that comes in several frames."""

    def __init__(self, header: worker_pb2.RequestHeader, arrived_ns: int) -> None:
        self.header = header
        self.arrived_ns = arrived_ns
        self._payload = bytearray(header.total_length)
        self._filled = 0

    def add(self, part: bytes) -> None:
        """Add the next part. Raises :class:`ProtocolError` when there are more than announced."""
        end = self._filled + len(part)
        if end > len(self._payload):
            raise ProtocolError(f"a payload of {len(self._payload)} bytes goes on to {end}")
        self._payload[self._filled : end] = part
        self._filled = end

    def whole(self) -> memoryview:
        """Return the payload. Raises :class:`ProtocolError` when it is shorter than announced."""
        if self._filled != len(self._payload):
            raise ProtocolError(f"{self._filled} bytes of a payload of {len(self._payload)}")
        return memoryview(self._payload)


def _adopt(descriptor: int) -> socket.socket:
    # What was handed over by inheritance must not go on to children that a library starts.
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def _map(descriptor: int, size: int, *, writable: bool) -> Arena:
    try:
        arena = Arena(descriptor, size, writable=writable)
    finally:
        os.close(descriptor)
    arena.populate(0, min(size, EXTENT_BYTES))
    return arena
