"""The control socket of one worker: commands with answers, progress, heartbeats."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from modelhostd.adapters.workers import errors
from modelhostd.adapters.workers.streams import FrameStream
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Phase, Progress
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Frame, Kind, ProtocolError

_ANSWERS = {
    Kind.HELLO: Kind.HELLO,
    Kind.LOAD: Kind.LOADED,
    Kind.UNLOAD: Kind.UNLOADED,
    Kind.DEMOTE: Kind.DEMOTED,
    Kind.PROMOTE: Kind.LOADED,
    Kind.DROP_COPY: Kind.COPY_DROPPED,
    Kind.CHECK: Kind.CHECKED,
}
_REPORTED = frozenset({Kind.LOAD, Kind.PROMOTE})
_PHASES = frozenset({Phase.LOADING, Phase.CHECKING})

BYTES_MAX = 1 << 50
"""A petabyte: what a worker says of sizes beyond it is no size, and sums of them would fit no message."""

T = TypeVar("T")


class _Command:
    __slots__ = ("answer", "generation", "kind", "model", "read", "report")

    def __init__(
        self,
        kind: Kind,
        generation: int,
        read: Callable[[bytes], Any],
        model: str,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self.kind = kind
        self.generation = generation
        self.read = read
        self.model = model
        self.report = report
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Commands:
    """Commands in flight on the control socket. Answers may come in any order."""

    def __init__(
        self,
        on_beat: Callable[[worker_pb2.HeartbeatHeader], None],
        on_kept: Callable[[int, bytes], None],
    ) -> None:
        """``on_kept`` gets the generation and the header of each KEPT frame."""
        self._on_beat = on_beat
        self._on_kept = on_kept
        self._in_flight: dict[int, _Command] = {}
        self._next = 0
        self._gone: Callable[[str], ModelhostError] | None = None
        self.stream: FrameStream

    def send(
        self,
        kind: Kind,
        generation: int,
        header: Message,
        read: Callable[[bytes], T],
        *,
        model: str = "",
        report: Callable[[Progress], None] | None = None,
    ) -> tuple[int, "asyncio.Future[T]"]:
        """Send a command; return its number and the future of what ``read`` makes of its answer's header.

        The future raises the worker's typed error. An answer that ``read`` raises at is the end of the worker.
        It is waited for even where nobody here waits any more.
        """
        self._next += 1
        command = self._in_flight[self._next] = _Command(kind, generation, read, model, report)
        if self._gone is not None:
            del self._in_flight[self._next]
            command.answer.set_exception(self._gone(model))
        else:
            encoded = header.SerializeToString()
            self.stream.write(frames.encode(kind, 0, self._next, generation, encoded))
        return self._next, command.answer

    def cancel(self, number: int, *, command: bool) -> None:
        """Send CANCEL for a request, or for a command of this socket."""
        header = worker_pb2.CancelHeader(command=command).SerializeToString()
        self.stream.write(frames.encode(Kind.CANCEL, 0, number, 0, header))

    def take(self, frame: Frame) -> None:
        """Take a frame of the worker. Raises :class:`ProtocolError` for what answers nothing."""
        if frame.kind == Kind.HEARTBEAT:
            self._on_beat(worker_pb2.HeartbeatHeader.FromString(frame.header))
            return
        if frame.kind == Kind.KEPT:
            self._on_kept(frame.generation, frame.header)
            return
        command = self._in_flight.get(frame.request)
        if command is None or command.generation != frame.generation:
            raise ProtocolError(f"an answer to command {frame.request}, which is not in flight")
        if frame.kind == Kind.LOAD_PROGRESS:
            self._progress(command, frame)
            return
        if frame.kind not in (Kind.ERROR, _ANSWERS[command.kind]):
            raise ProtocolError(f"kind {frame.kind} in answer to kind {command.kind}")
        # Read before it is taken off the list: what cannot be read leaves it to fail with the worker.
        read = errors.from_header if frame.kind == Kind.ERROR else command.read
        answer = read(frame.header)
        del self._in_flight[frame.request]
        if command.answer.done():
            return
        if frame.kind == Kind.ERROR:
            command.answer.set_exception(answer)
        else:
            command.answer.set_result(answer)

    def fail_all(self, error: Callable[[str], ModelhostError]) -> None:
        """Answer everything in flight with ``error(model)``, and whatever is asked from now on."""
        self._gone = error
        commands = list(self._in_flight.values())
        self._in_flight.clear()
        for command in commands:
            if not command.answer.done():
                command.answer.set_exception(error(command.model))
                # Its caller may have gone; asking marks the error as seen.
                command.answer.exception()

    def _progress(self, command: _Command, frame: Frame) -> None:
        if command.kind not in _REPORTED:
            raise ProtocolError(f"load progress in answer to kind {command.kind}")
        header = worker_pb2.LoadProgressHeader.FromString(frame.header)
        if max(header.done_bytes, header.total_bytes) > BYTES_MAX:
            raise ProtocolError(
                f"load progress of {header.done_bytes} of {header.total_bytes} bytes"
            )
        if command.report is None or header.phase not in _PHASES:
            return
        command.report(
            Progress(
                phase=Phase(header.phase),
                done_bytes=header.done_bytes,
                total_bytes=header.total_bytes,
            )
        )
