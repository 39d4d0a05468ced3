"""A backend that does what a test tells it to: waits, crashes, hangs, answers nonsense.

What to do is the request parameter ``do``, or the option ``load`` or ``check`` of the model. Waiting is for a file to
appear, so that tests and not times decide.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from modelhostd.worker.backend import (
    Backend,
    Cancelled,
    HealthReport,
    InferContext,
    LoadContext,
    LoadError,
    Output,
    Signature,
    Tensor,
    UnsupportedModelError,
)

PAUSE_S = 0.002


class TroubleBackend(Backend):
    """Answers its inputs, after it did what it was told."""

    tasks = frozenset({"trouble"})

    def __init__(self) -> None:
        self._memory = bytearray()
        self._check = ""
        self._unload = ""
        self._batched = False
        self._max_batch_size = 0
        self._poisoned = False

    def load(self, context: LoadContext) -> None:
        """Take ``bytes`` bytes, then do what option ``load`` says."""
        self._memory = bytearray(int(context.options.get("bytes", 0)))
        self._check = str(context.options.get("check", ""))
        self._unload = str(context.options.get("unload", ""))
        self._batched = bool(context.options.get("batched", False))
        self._max_batch_size = context.max_batch_size
        self.concurrency = int(context.options.get("concurrency", 1))
        total = len(self._memory)
        context.report(total // 2, total)
        what = str(context.options.get("load", ""))
        if what == "fail":
            raise LoadError(f"no luck with {context.model_dir}/weights")
        if what == "unsupported":
            raise UnsupportedModelError("it is of another kind")
        if what == "bug":
            raise ZeroDivisionError("a secret of the library")
        if what == "memory":
            raise MemoryError
        if what == "exit":
            os._exit(3)
        if what.startswith("wait:"):
            wait_for(Path(what[5:]), context.cancelled)
            context.check_cancelled()
        context.report(total, total)

    def signature(self) -> Signature:
        """Return the empty signature; with option ``batched`` requests are joined."""
        return Signature(
            batched=self._batched, max_batch_size=self._max_batch_size, joinable=self._batched
        )

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Do what parameter ``do`` says, then answer the inputs."""
        what = str(context.parameters.get("do", ""))
        verb, _, argument = what.partition(":")
        if verb == "wait":
            wait_for(Path(argument), context.cancelled)
            context.check_cancelled()
        elif verb == "advance":
            while not Path(argument).exists():
                context.check_cancelled()
                time.sleep(PAUSE_S)
        elif verb == "shout":
            for number in range(int(argument)):
                sys.stderr.write(f"line {number} {'x' * 100}\n")
        elif verb == "stuck":
            # As a call into a library that never comes back: no progress, no look at cancellation.
            Path(argument).touch()
            time.sleep(3600)
        elif verb == "hold":
            # As C code that does not let go of the interpreter.
            Path(argument).touch()
            ctypes.PyDLL(None).sleep(3600)
        elif verb == "kill":
            os.kill(os.getpid(), getattr(signal, argument))
            time.sleep(3600)
        elif verb == "segv":
            ctypes.string_at(0)
        elif verb == "exit":
            sys.stderr.write("last words\n")
            sys.stderr.flush()
            os._exit(int(argument))
        elif verb == "raise":
            raise ZeroDivisionError("a secret of the model")
        elif verb == "system-exit":
            sys.exit("leaving")
        elif verb == "memory":
            raise MemoryError
        elif verb == "poison":
            self._poisoned = True
            raise RuntimeError("device-side assert")
        elif verb == "nonsense":
            return {"out": np.zeros(2, np.complex128)}
        elif verb == "grow":
            return {"out": np.zeros(int(argument), np.uint8)}
        if self._batched and any(np.isnan(one.array).any() for one in inputs.values()):
            raise ZeroDivisionError("a NaN among them")
        return inputs

    def infer_stream(
        self, inputs: Mapping[str, Tensor], context: InferContext
    ) -> Iterator[Mapping[str, Output]]:
        """Answer as many numbers as parameter ``count`` says; fail at ``fail_at``."""
        for number in range(int(context.parameters.get("count", 3))):
            if number == context.parameters.get("fail_at", -1):
                raise ZeroDivisionError("in the middle")
            if context.cancelled():
                with contextlib.suppress(OSError):
                    Path(str(context.parameters.get("note", ""))).write_text(str(number))
                raise Cancelled
            yield {"number": np.array([number], np.int64)}

    def health_check(self) -> HealthReport:
        """Answer what option ``check`` says."""
        if self._check == "raise":
            raise ZeroDivisionError("in the check")
        if self._check.startswith("file:"):
            ok = not Path(self._check[5:]).exists()
            return HealthReport(ok=ok, message="The file is there." if not ok else "All well.")
        return HealthReport(ok=self._check != "bad", message="As it was told.")

    def unload(self) -> None:
        """Drop the memory, or with option ``unload`` = ``stuck`` never come back."""
        if self._unload == "stuck":
            time.sleep(3600)
        self._memory = bytearray()

    @property
    def measured_bytes(self) -> int:
        """Return the bytes taken."""
        return len(self._memory)

    def is_poisoned(self, error: BaseException) -> bool:
        """Whether the request said so."""
        return self._poisoned and isinstance(error, RuntimeError)


def wait_for(gate: Path, cancelled) -> None:
    """Note beside ``gate`` that one more stands before it, and wait until it is there."""
    started = gate.with_name(f"{gate.name}.{os.getpid()}.{time.monotonic_ns()}.started")
    started.touch()
    while not gate.exists() and not cancelled():
        time.sleep(PAUSE_S)
