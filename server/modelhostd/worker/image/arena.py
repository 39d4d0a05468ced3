"""The host arena: memory for images, contiguous for each, faulted before it is filled, read-only afterwards.

One sparse memfd, mapped once and far larger than any memory: an image is a range of it, so there is no
fragmentation to care about, and what is freed is a hole again. Fresh pages cost five times what filling warm ones does
(measured on two cores: 1.3 to 2 GB/s against 10 to 13), so an operator may have some kept ready. That is of huge pages where the
kernel gives them: small ones that lie scattered take up to a fifth longer to fill (bench/RESULTS.md).
"""

import contextlib
import ctypes
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterable

import torch

from modelhostd.worker.image.space import Space, Span
from modelhostd.worker.own_threads import start_thread
from modelhostd.worker.wire import images
from modelhostd.worker.wire.images import PAGE_BYTES, SPACE_BYTES, Range

log = logging.getLogger("modelhostd.worker")

AHEAD_BYTES = 64 * 2**20
"""Of one step of faulting ahead; a load that comes takes what is ready by then."""

MAP_NORESERVE = 0x4000
MADV_REMOVE = 9
MADV_DONTDUMP = 16
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
HUGE_BYTES = 2 * 2**20

_LIBC = ctypes.CDLL(None, use_errno=True)


class Block:
    """A range of the arena. ``tensor`` (uint8) is its memory; whatever is made of it is a view.

    ``prepare`` may be called by several threads at a time, for parts that do not overlap.
    """

    def __init__(self, arena: "HostArena", taken: Span, size: int, ready: int) -> None:
        self.tensor = arena.view(taken.start, size)
        self.size = size
        self._arena = arena
        self._taken = taken
        self._ready = ready

    @property
    def place(self) -> Range:
        """Where in the arena it is."""
        return Range(self._taken.start, self.size)

    def bytes(self, start: int, length: int) -> memoryview:
        """Return a part of the memory itself: not for one moment longer than the block is there."""
        return self._arena.bytes(self._taken.start + start, length)

    def prepare(self, start: int, length: int) -> None:
        """Give a part its memory before it is filled. Raises ``MemoryError``."""
        first = max(self._ready, start // PAGE_BYTES * PAGE_BYTES)
        last = min(self._taken.length, _to_page(start + length))
        if first < last:
            self._arena.populate(self._taken.start + first, last - first)

    def protect(self) -> None:
        """Make it read-only: from now on a wild write is a crash, not a wrong answer."""
        self._arena.protect(self._taken, mmap.PROT_READ)

    def free(self) -> bool:
        """Give it back, unless something still holds a view of it: then it stays, and False is returned."""
        if not only_holder(self.tensor):
            return False
        self.leave()
        return True

    def leave(self) -> None:
        """Give it back; who has a view of it makes no use of that any more."""
        del self.tensor
        self._arena.give_back(self._taken)

    def drop(self) -> None:
        """Give it back with nothing of it kept ready; nobody has a view."""
        del self.tensor
        self._arena.give_back(self._taken, keep=False)


class LentBlock(Block):
    """A range that an earlier process filled: until it is claimed, freeing it leaves what is there."""

    _own = _left = False

    def free(self) -> bool:
        """Give it back, or leave it read-only as it was found."""
        if self._own:
            return super().free()
        if not only_holder(self.tensor):
            return False
        del self.tensor
        self.protect()
        self._left = True
        return True

    def claim(self) -> None:
        """Have it be as any other from now on; what was left already is given back."""
        self._own = True
        if self._left:
            self._arena.give_back(self._taken, keep=False)


class HostArena:
    """Memory for images. What is freed is kept, faulted, as long as all of it is at most ``ready_bytes``."""

    def __init__(
        self,
        name: str,
        ready_bytes: int = 0,
        descriptor: int = -1,
        held: Iterable[Range] = (),
    ) -> None:
        """Make an empty arena: addresses only. Raises ``OSError``.

        ``descriptor``: memory that was made before, in which ``held`` has contents; these are
        read-only until they are restored or released.
        """
        # Its own: who could not make one asks again with the same number, which is not to be somebody else's by then.
        descriptor = images.create(name) if descriptor < 0 else os.dup(descriptor)
        try:
            self._map = _mapped(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._map.madvise(MADV_DONTDUMP)
        self._view = memoryview(self._map)
        self._address = _address(self._map)
        self._ready_bytes = _to_page(ready_bytes)
        self._lock = threading.Lock()
        """Held while addresses change hands, until what is to have no memory has none."""
        there = [_pages(part) for part in held]
        self._space = Space(len(self._map), self._ready_bytes, there)
        for taken in there:
            self.protect(taken, mmap.PROT_READ)

    @property
    def taken_bytes(self) -> int:
        """Bytes that blocks hold, in whole pages."""
        with self._lock:
            return self._space.taken_bytes

    @property
    def ready_bytes(self) -> int:
        """Bytes that are faulted and in nobody's hands."""
        with self._lock:
            return self._space.ready_bytes

    def take(self, size: int, *, fresh: bool = False) -> Block:
        """Return a block of ``size`` bytes; unless ``fresh``, of what is ready as much as there is.

        Raises ``MemoryError`` where there are no addresses left.
        """
        with self._lock:
            taken, ready, holes = self._space.take(_to_page(max(size, 1)), fresh=fresh)
            self._punch(holes)
        return Block(self, taken, size, ready)

    def restore(self, place: Range) -> LentBlock:
        """Return a range that was held from the beginning, to be written to only by who sends it to a device."""
        taken = _pages(place)
        # Memory is pinned for writing, too.
        self.protect(taken, mmap.PROT_READ | mmap.PROT_WRITE)
        return LentBlock(self, taken, place.length, taken.length)

    def release(self, place: Range) -> None:
        """Free a range that was held from the beginning, and is not restored."""
        self.give_back(_pages(place), keep=False)

    def give_back(self, taken: Span, *, keep: bool = True) -> None:
        """Free a range: ``keep`` what the limit allows, punch a hole for the rest."""
        self.protect(taken, mmap.PROT_READ | mmap.PROT_WRITE)
        with self._lock:
            self._punch(self._space.give_back(taken, keep=keep))

    def fault_ahead(self) -> None:
        """Fault what shall be ready and is not, in a thread of its own. Call it once."""
        if self._ready_bytes:
            start_thread(self._fault, name="fault-ahead")

    def view(self, start: int, size: int) -> torch.Tensor:
        """Return bytes of the arena as a tensor with a storage of its own."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        # Memory that is wrapped in inference mode cannot be filled outside of it.
        with torch.inference_mode(mode=False):
            return torch.frombuffer(self._view[start : start + size], dtype=torch.uint8)

    def bytes(self, start: int, length: int) -> memoryview:
        """Return bytes of the arena."""
        return self._view[start : start + length]

    def populate(self, start: int, length: int) -> None:
        """Allocate and map pages. Raises ``MemoryError`` where there are none."""
        try:
            os.posix_fallocate(self._descriptor, start, length)
            self._advise(start, length, MADV_POPULATE_WRITE)
        except OSError as error:
            raise MemoryError(f"no memory for {length} bytes of an image") from error

    def collapse(self, taken: Span) -> None:
        """Have pages that are there be huge ones, as far as the kernel has such."""
        with contextlib.suppress(OSError):
            self._advise(taken.start, taken.length, MADV_COLLAPSE)

    def protect(self, taken: Span, protection: int) -> None:
        """Set what may be done with a range."""
        # In steps: 400 MB take 5 ms, in which no other thread can map or unmap anything.
        for start in range(taken.start, taken.end, AHEAD_BYTES):
            address = ctypes.c_void_p(self._address + start)
            length = ctypes.c_size_t(min(taken.end - start, AHEAD_BYTES))
            if _LIBC.mprotect(address, length, protection) != 0:
                raise OSError(ctypes.get_errno(), "mprotect of an image")

    # --- inside ---------------------------------------------------------------------------------

    def _advise(self, start: int, length: int, advice: int) -> None:
        # Not by mmap.madvise, which keeps the interpreter's lock: a GiB takes a tenth of a second and more.
        address = ctypes.c_void_p(self._address + start)
        if _LIBC.madvise(address, ctypes.c_size_t(length), advice) != 0:
            raise OSError(ctypes.get_errno(), "madvise of the host arena")

    def _punch(self, holes: Iterable[Span]) -> None:
        for hole in holes:
            self._advise(hole.start, hole.length, MADV_REMOVE)

    def _fault(self) -> None:
        try:
            while (missing := self._missing_bytes()) > 0:
                missing = min(missing, AHEAD_BYTES)
                block = self.take(missing, fresh=True)
                try:
                    block.prepare(0, missing)
                    self.collapse(_pages(block.place))
                except BaseException:
                    block.drop()
                    raise
                block.free()
        except MemoryError:
            log.warning(
                "no memory for the %d bytes that shall be ready for images", self._ready_bytes
            )

    def _missing_bytes(self) -> int:
        with self._lock:
            return self._space.missing_bytes


def only_holder(tensor: torch.Tensor, views: int = 0) -> bool:
    """Whether nothing but this tensor uses its memory: no view, in Python or in C++, beside ``views`` of them."""
    storage = tensor.untyped_storage()
    # One use is the tensor's, one that of the storage's own Python object.
    return bool(torch._C._storage_Use_Count(storage._cdata) == 2 + views)  # noqa: SLF001


def _mapped(descriptor: int) -> mmap.mmap:
    """Map memory so that what begins a huge page there does so among the addresses, as far as one can have that."""
    flags = mmap.MAP_SHARED | MAP_NORESERVE
    mapped = mmap.mmap(descriptor, SPACE_BYTES, flags=flags)
    over = _address(mapped) % HUGE_BYTES
    if over:
        mapped.close()
        # The kernel puts it below what is taken: a little less of it begins a little higher.
        mapped = mmap.mmap(descriptor, SPACE_BYTES - HUGE_BYTES + over, flags=flags)
    return mapped


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def _to_page(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _pages(place: Range) -> Span:
    return Span(place.start, _to_page(place.length))
