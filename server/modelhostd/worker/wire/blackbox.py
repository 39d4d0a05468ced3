"""A page that tells what a worker's threads were doing when it died; it outlives the worker.

It follows the response arena in the same memory. Each thread writes its own entry when it begins and ends something, with no
system call, so it is exact where the last heartbeat is up to a second old. The daemon reads it after
the worker is reaped, and finds in it the model that bears the blame.

Entry (128 bytes): u64 thread id as faulthandler prints it, u64 time of begin (monotonic ns), u8 loading, u8 length, model id.
"""

import re
import struct
from collections.abc import Sequence

from modelhostd.core.values import dataclass

PAGE_BYTES = 4096
_ENTRY = struct.Struct("<QQBB")
_ENTRY_BYTES = 128
_MODEL_BYTES = _ENTRY_BYTES - _ENTRY.size
ENTRIES = PAGE_BYTES // _ENTRY_BYTES

# "Current thread 0x00007f1c5d3fe6c0 (most recent call first):", also with a name before the bracket.
_CRASHED_THREAD = re.compile(r"^Current thread 0x([0-9a-f]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Work:
    """What one thread was doing."""

    thread: int
    begin_ns: int
    model: str
    loading: bool


class BlackBox:
    """The page, seen from the worker (``write``, ``clear``) or from the daemon (``read``)."""

    def __init__(self, memory: memoryview) -> None:
        """Use the first ``PAGE_BYTES`` of ``memory``."""
        self._memory = memory

    def write(self, entry: int, thread: int, begin_ns: int, model: str, *, loading: bool) -> None:
        """Note what the thread of ``entry`` does from now on. Entries past the page are not kept."""
        if entry >= ENTRIES:
            return
        name = model.encode()[:_MODEL_BYTES]
        start = entry * _ENTRY_BYTES
        end = start + _ENTRY.size
        # The length goes last: until then the entry counts as idle.
        self._memory[start + _ENTRY.size - 1] = 0
        self._memory[end : end + len(name)] = name
        _ENTRY.pack_into(self._memory, start, thread, begin_ns, loading, len(name))

    def clear(self, entry: int) -> None:
        """Note that the thread of ``entry`` is idle."""
        if entry < ENTRIES:
            self._memory[entry * _ENTRY_BYTES + _ENTRY.size - 1] = 0

    def release(self) -> None:
        """Let go of the memory, so that its arena can be unmapped."""
        self._memory.release()

    def read(self) -> list[Work]:
        """Return what the threads were doing, idle ones left out. Never raises, whatever is there."""
        works = []
        for entry in range(ENTRIES):
            start = entry * _ENTRY_BYTES
            thread, begin_ns, loading, length = _ENTRY.unpack_from(self._memory, start)
            if 0 < length <= _MODEL_BYTES:
                end = start + _ENTRY.size
                model = bytes(self._memory[end : end + length]).decode(errors="replace")
                works.append(Work(thread, begin_ns, model, bool(loading)))
        return works


def blame(works: Sequence[Work], stderr_tail: str) -> str:
    """Return the model that most likely took its worker down; empty when nothing was executing.

    The thread that faulthandler names, if it left its dump; else a load, the likelier cause of a
    worker killed for memory; else what began last.
    """
    for thread in reversed(_CRASHED_THREAD.findall(stderr_tail)):
        for work in works:
            if work.thread == int(thread, 16):
                return work.model
    latest = max(works, key=lambda work: (work.loading, work.begin_ns), default=None)
    return latest.model if latest is not None else ""
