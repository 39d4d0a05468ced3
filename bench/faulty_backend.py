"""A backend that brings its worker down in the way that a request asks for: for benches and fault tests.

What to do is the request parameter ``do``, a verb and an argument: ``advance:/path`` works until that file is there,
``segv`` reads address 0, ``sicken`` has each health check fail until it is loaded anew. Option ``bytes`` is
memory that the model takes and touches.
"""

import ctypes
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from modelhostd.worker.backend import (
    Backend,
    HealthReport,
    InferContext,
    LoadContext,
    Output,
    Signature,
    Tensor,
)
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Kind

PAUSE_S = 0.002
CHILD_S = "3"
MIB = 2**20
ROOM_BYTES = 96 * MIB
"""What a worker may still take when it eats memory: more than threads need, less than a machine minds."""
BURST_FRAMES = 2000
WHOLE_BYTES = 16 * 1024


class FaultyBackend(Backend):
    """Answers its inputs, after it did what it was told."""

    tasks = frozenset({"faulty"})

    def __init__(self) -> None:
        self._memory: np.ndarray[tuple[int], np.dtype[np.uint8]] = np.zeros(0, np.uint8)
        self._eaten: list[bytearray] = []
        self._poisoned = False
        self._sick = False

    def load(self, context: LoadContext) -> None:
        """Take the memory, in pages that are really there."""
        self._memory = np.ones(int(context.options.get("bytes", 0)), np.uint8)
        context.report(len(self._memory), len(self._memory))

    def signature(self) -> Signature:
        """Return the empty signature."""
        return Signature()

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Do what parameter ``do`` says, then answer the inputs."""
        verb, _, argument = str(context.parameters.get("do", "")).partition(":")
        if verb == "pid":
            return {"pid": np.array([os.getpid()], np.int64)}
        if verb == "advance":
            work_until(Path(argument), context)
        elif verb == "shout":
            for number in range(int(argument)):
                sys.stderr.write(f"line {number} {'x' * 100}\n")
        elif verb == "poison":
            self._poisoned = True
            raise RuntimeError("device-side assert")
        elif verb == "sicken":
            self._sick = True
        elif verb == "eat":
            self._eat()
        elif verb:
            sys.stderr.write("last words\n")
            sys.stderr.flush()
            (DEATHS.get(verb) or FRAMES[verb])()
            threading.Event().wait()
        return inputs

    def _eat(self) -> None:
        """Take memory until there is none, and keep it."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        # Asked again (the host tries once more after it has made room) the limit of the first time holds.
        if resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY:
            limit = pages * resource.getpagesize() + ROOM_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while True:
            self._eaten.append(bytearray(MIB))

    def health_check(self) -> HealthReport:
        """Report that all is well, unless it was made sick."""
        return HealthReport(ok=not self._sick, message="As it was told.")

    def unload(self) -> None:
        """Drop the memory."""
        self._memory = np.zeros(0, np.uint8)

    @property
    def measured_bytes(self) -> int:
        """Return the bytes taken."""
        return len(self._memory)

    def is_poisoned(self, error: BaseException) -> bool:
        """Whether the request said so."""
        return self._poisoned and isinstance(error, RuntimeError)


def work_until(gate: Path, context: InferContext) -> None:
    """Note beside ``gate`` that one more works, and get on until it is there."""
    gate.with_name(f"{gate.name}.{os.getpid()}.{threading.get_ident()}.started").touch()
    pause = threading.Event()
    while not gate.exists():
        context.check_cancelled()
        pause.wait(PAUSE_S)


# --- ends -----------------------------------------------------------------------------------------


def _segv() -> None:
    ctypes.string_at(0)


def _leave_a_child() -> None:
    """Die by SIGKILL with a child that holds the sockets and the pipe of this process a while longer."""
    descriptors = [_descriptor("control"), _descriptor("data")]
    subprocess.Popen(["sleep", CHILD_S], pass_fds=descriptors)
    os.kill(os.getpid(), signal.SIGKILL)


DEATHS: Mapping[str, Callable[[], object]] = {
    "segv": _segv,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(0),
    "abort": os.abort,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stuck": lambda: None,
    "hold": lambda: ctypes.PyDLL(None).sleep(3600),
    "child": _leave_a_child,
}
"""Ways in which the process ends, or stands still."""


# --- frames ---------------------------------------------------------------------------------------


def _descriptor(name: str) -> int:
    """Return the number of one of this process's sockets, as its command line has it."""
    option = f"--{name}="
    (word,) = (word for word in sys.argv if word.startswith(option))
    return int(word.removeprefix(option))


def _send(name: str, data: bytes) -> None:
    """Send all of it, whatever the worker's other threads send in between."""
    descriptor = _descriptor(name)
    while data:
        data = data[os.write(descriptor, data) :]


def _response(request: int, generation: int = 1, flags: int = frames.FINAL) -> bytes:
    return frames.encode(Kind.RESPONSE, flags, request, generation)


def _huge_length() -> None:
    frame = bytearray(_response(1))
    frame[8:12] = (2**32 - 1).to_bytes(4, "little")
    _send("data", bytes(frame))


def _wrong_generation() -> None:
    """Answer whatever may be in flight, for another generation of its instance."""
    _send("data", b"".join(_response(number, 2**40) for number in range(1, BURST_FRAMES)))


def _flood(name: str, frame: bytes) -> None:
    """Send the frame again and again, for as long as it is read.

    In writes that the kernel takes whole: cut by one of the worker's own frames it would be garbage.
    """
    burst = frame * (WHOLE_BYTES // len(frame))
    while True:
        _send(name, burst)


def _close() -> None:
    """Close the data socket, also for the threads that wait in it."""
    with socket.socket(fileno=os.dup(_descriptor("data"))) as data:
        data.shutdown(socket.SHUT_RDWR)


def _beats() -> None:
    beat = worker_pb2.HeartbeatHeader()
    for number in range(8):
        beat.threads.add(name=f"executor-{number}", model="m")
    _flood("control", frames.encode(Kind.HEARTBEAT, 0, 0, 0, beat.SerializeToString()))


FRAMES: Mapping[str, Callable[[], object]] = {
    "garbage": lambda: _send("data", random.Random(2).randbytes(100_000)),
    "control-garbage": lambda: _send("control", random.Random(1).randbytes(100_000)),
    "huge-length": _huge_length,
    "unknown-id": lambda: _send("data", _response(2**50)),
    "unknown-command": lambda: _send("control", frames.encode(Kind.UNLOADED, 1, 2**50, 1)),
    "wrong-generation": _wrong_generation,
    "flood": lambda: _flood("data", _response(2**50, flags=0)),
    "beats": _beats,
    "close": _close,
}
"""Ways to break the worker protocol, from inside a worker that is otherwise a good one."""
