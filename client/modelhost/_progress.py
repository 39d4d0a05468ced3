"""Progress of an operation for people: a bar on a terminal, plain lines elsewhere, on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from modelhost import _names
from modelhost._enums import name_of
from modelhost._text import plain, show_bytes, show_seconds
from modelhost.v1 import operations_pb2

if TYPE_CHECKING:
    from rich.console import Console

Operation = operations_pb2.Operation
Report = Callable[[Operation], None]

STEP_PERCENT = 10
"""How often plain lines come: at each phase, and at each of so many per cent."""


@contextlib.contextmanager
def reporter(progress: Report | bool | None) -> Iterator[Report]:
    """Return what is to be called with each state of an operation.

    ``progress`` True = shown on stderr; a callable is called itself; None and False = nothing.
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda operation: None
    else:
        with shown(sys.stderr) as report:
            yield report


@contextlib.contextmanager
def shown(stream: TextIO, console: "Console | None" = None) -> Iterator[Report]:
    """Show progress on ``stream``: a bar where it is a terminal, lines where it is not."""
    if stream.isatty():
        from modelhost._bars import bars

        with bars(stream, console) as report:
            yield report
    else:
        yield Lines(stream)


class Lines:
    """Progress as lines of text: for each phase, each tenth of the bytes, and whatever is tried again."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: dict[str, tuple[object, ...]] = {}

    def __call__(self, operation: Operation) -> None:
        """Write a line, if there is something new to say."""
        progress = operation.progress
        percent = 100 * progress.done_bytes // progress.total_bytes if progress.total_bytes else -1
        step = percent // STEP_PERCENT if percent >= 0 else -1
        tried = (progress.retry.attempt, progress.retry.reason)
        seen = (operation.state, progress.phase, step, tried)
        if seen != self._last.get(operation.name):
            self._last[operation.name] = seen
            line = f"{title(operation)}: {phase_word(operation)}"
            if percent >= 0:
                line += f" {percent} % {amounts(operation)}"
            elif progress.HasField("retry"):
                line += f" {amounts(operation)}"
            if waits := without_room(operation):
                line += f": {waits}"
            self._stream.write(line.rstrip() + "\n")
            self._stream.flush()


def title(operation: Operation) -> str:
    """Return what is being done to what: ``download minilm``."""
    kind = _word(name_of(Operation.Kind, operation.kind))
    return f"{kind} {plain(_names.short(operation.model))}".strip()


def phase_word(operation: Operation) -> str:
    """Return what an operation is busy with, in one or two words."""
    if without_room(operation):
        return "waits for room on disk"
    progress = operation.progress
    if operation.state == Operation.QUEUED and 0 < progress.total_bytes <= progress.done_bytes:
        # Quick work: it was done before anybody was told that it had begun.
        return "running"
    if operation.state != Operation.RUNNING:
        word = _word(name_of(Operation.State, operation.state))
        return f"{word} ({operation.queue_position})" if operation.queue_position else word
    phase = progress.phase
    if not phase:
        return "running"
    return _word(name_of(operations_pb2.OperationProgress.Phase, phase))


def without_room(operation: Operation) -> str:
    """Return what a download lacks that waits for room on disk, and what to do; empty = it does not."""
    waits = operation.state == Operation.PAUSED and operation.progress.HasField("retry")
    return plain(operation.progress.retry.message) if waits else ""


def amounts(operation: Operation) -> str:
    """Return bytes done and in all, the rate and the time left, as far as they are known."""
    progress = operation.progress
    parts = []
    if progress.total_bytes:
        parts.append(f"{show_bytes(progress.done_bytes)} of {show_bytes(progress.total_bytes)}")
    if operation.state == Operation.RUNNING and progress.bytes_per_second >= 1:
        parts.append(f"{show_bytes(int(progress.bytes_per_second))}/s")
    if operation.state == Operation.RUNNING and progress.HasField("eta"):
        parts.append(f"{show_seconds(progress.eta.ToTimedelta().total_seconds())} left")
    if operation.state == Operation.RUNNING and progress.HasField("retry"):
        parts.append(retry_words(progress.retry))
    return ", ".join(parts)


def retry_words(retry: operations_pb2.OperationProgress.Retry, now: float | None = None) -> str:
    """Return what is tried again: why, how often it failed, and in how many seconds."""
    words = f"again after {plain(retry.reason)}"
    if retry.attempt:
        words += f" ({retry.attempt})"
    left = retry.next_time.ToMicroseconds() / 1e6 - (time.time() if now is None else now)
    if retry.HasField("next_time") and left >= 1:
        words += f" in {show_seconds(left)}"
    return words


def _word(name: str) -> str:
    return name.lower().replace("_", " ")
