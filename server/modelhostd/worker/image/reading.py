"""Reads the tensors of safetensors files into one piece of memory, with several threads.

A file's bytes are cut into chunks that the threads claim in order; one ``preadv`` scatters a chunk over the aligned
places of its tensors. Where the precision differs, a chunk is read beside and converted into its place. Buffered reads: the
page cache is a tier for free.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from modelhostd.core.values import dataclass
from modelhostd.worker.backend import LoadError
from modelhostd.worker.image.layout import ALIGNMENT, align
from modelhostd.worker.own_threads import start_thread
from modelhostd.worker.wire.images import PAGE_BYTES

CHUNK_BYTES = 16 * 2**20
LAST_BYTES = 2**20
"""Of the last chunks, which are smaller than those before: else one thread reads for a while after the others ended."""
NEAR_BYTES = 64
LARGE_BYTES = 64 * 2**10
"""Bytes that go to less than ``NEAR_BYTES`` behind where they lie in their page are copied at a quarter to half of the rate (AMD's
``rep movsb``, which is the kernel's copy; bench/RESULTS.md): tensors from ``LARGE_BYTES`` on keep away from there."""
MAX_VECTORS = 1024
"""Of one preadv, as the kernel has it."""
MAX_THREADS = 16
"""Enough for the fastest drives; a copy out of the page cache is done by fewer."""


class Memory(Protocol):
    """What is read into."""

    tensor: torch.Tensor
    """All of it, as uint8."""

    def prepare(self, start: int, length: int) -> None:
        """Give a part its memory before it is filled."""

    def filled(self, start: int, length: int) -> None:
        """Take note that a part is filled."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: ``start`` counts from the file's begin, ``dtype`` is what it shall be."""

    name: str
    stored: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: int
    """Index of its file."""
    start: int
    length: int

    @property
    def final_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.length // self.stored.itemsize * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes of a file that follow each other, and where they go: (offset, length in memory) each.

    ``end`` = what follows in memory belongs to the next chunk: the last place's end, or where the next tensor begins.
    """

    file: int
    start: int
    length: int
    places: tuple[tuple[int, int], ...]
    end: int
    converted: Stored | None = None


class Plan:
    """Where each tensor goes, before a byte is read. ``total_bytes`` is what ``reading`` needs."""

    def __init__(self, tensors: Sequence[Stored]) -> None:
        """Place tensors, those of a file in the order of their bytes, in memory that begins a page."""
        self._tensors = tensors
        self._offsets: list[int] = []
        total = 0
        for tensor in tensors:
            if _is_near(total, tensor):
                total += ALIGNMENT
            self._offsets.append(total)
            total += align(tensor.final_bytes)
        self.total_bytes = total
        # What lies between two tensors belongs to the first of them.
        self._ends: list[int] = []
        for tensor, offset in zip(reversed(tensors), reversed(self._offsets), strict=True):
            self._ends.append(total)
            total = offset if tensor.length else total
        self._ends.reverse()
        self._lead = total

    @contextlib.contextmanager
    def reading(
        self,
        names: Sequence[str],
        files: Sequence[int],
        memory: Memory,
        advance: Callable[[int], None],
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Give the tensors by name, as views of ``memory``, and read meanwhile; the end waits until they are whole.

        ``files`` are descriptors, ``names`` what errors call them. ``advance`` is told the bytes that were read, one call at
        a time; what it raises ends the reading. The end raises :class:`LoadError` for a file that became shorter,
        ``OSError`` and ``MemoryError``.
        """
        count = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        chunks = iter(list(self._chunks(count)))
        state = _Reading(names, files, memory, advance)
        threads: list[threading.Thread] = []
        try:
            if self._lead:
                memory.filled(0, self._lead)
            threads.extend(start_thread(state.run, chunks, name=f"read-{n}") for n in range(count))
            yield {
                tensor.name: _view(memory.tensor, offset, tensor)
                for tensor, offset in zip(self._tensors, self._offsets, strict=True)
            }
        except BaseException as error:
            state.stop(error)
        for thread in threads:
            thread.join()
        if state.error is not None:
            raise state.error

    def _chunks(self, threads: int) -> Iterator[_Chunk]:
        places: list[tuple[int, int]] = []
        begin = file = length = end = limit = 0
        left = sum(tensor.length for tensor in self._tensors)
        for tensor, offset, following in zip(self._tensors, self._offsets, self._ends, strict=True):
            plain = tensor.stored is tensor.dtype
            if places and (not plain or file != tensor.file or begin + length != tensor.start):
                yield _Chunk(file, begin, length, tuple(places), end)
                places, length = [], 0
            if not plain:
                yield from _converting(tensor, offset, following, chunk_bytes(left, threads))
                left -= tensor.length
                continue
            done = 0
            while done < tensor.length:
                if not places:
                    file, begin, length = tensor.file, tensor.start + done, 0
                    limit = chunk_bytes(left, threads)
                part = min(tensor.length - done, limit - length)
                places.append((offset + done, part))
                length += part
                done += part
                left -= part
                end = following if done == tensor.length else offset + done
                if length == limit or len(places) == MAX_VECTORS:
                    yield _Chunk(file, begin, length, tuple(places), end)
                    places = []
        if places:
            yield _Chunk(file, begin, length, tuple(places), end)


def chunk_bytes(left: int, threads: int) -> int:
    """Return of how many bytes the next chunk is, where so many are left for so many threads."""
    share = left // (2 * threads) // PAGE_BYTES * PAGE_BYTES
    return min(CHUNK_BYTES, max(LAST_BYTES, share))


class _Reading:
    """What the threads of one reading share."""

    def __init__(
        self,
        names: Sequence[str],
        files: Sequence[int],
        memory: Memory,
        advance: Callable[[int], None],
    ) -> None:
        self.error: BaseException | None = None
        self._names = names
        self._files = files
        self._memory = memory
        self._bytes = memory.tensor.numpy().data
        self._advance = advance
        self._lock = threading.Lock()

    def stop(self, error: BaseException) -> None:
        """Have no more be read, for an error of which none is the first."""
        with self._lock:
            self.error = self.error or error

    def run(self, chunks: Iterator[_Chunk]) -> None:
        """Read chunks until there are no more, or one thread failed."""
        beside: torch.Tensor | None = None
        while True:
            with self._lock:
                chunk = next(chunks, None) if self.error is None else None
            if chunk is None:
                return
            try:
                if chunk.converted is None:
                    self._read(chunk, [self._bytes[o : o + n] for o, n in self._prepared(chunk)])
                else:
                    if beside is None:
                        beside = torch.empty(CHUNK_BYTES + PAGE_BYTES, dtype=torch.uint8)
                    # As in its page, by what every type needs.
                    begin = (chunk.start - beside.data_ptr()) % PAGE_BYTES // 8 * 8
                    source = beside[begin : begin + chunk.length]
                    self._read(chunk, [source.numpy().data])
                    self._convert(chunk, chunk.converted, source)
                first = chunk.places[0][0]
                self._memory.filled(first, chunk.end - first)
                with self._lock:
                    self._advance(chunk.length)
            except BaseException as error:
                self.stop(error)
                return

    def _prepared(self, chunk: _Chunk) -> tuple[tuple[int, int], ...]:
        first, (last, length) = chunk.places[0][0], chunk.places[-1]
        self._memory.prepare(first, last + length - first)
        return chunk.places

    def _read(self, chunk: _Chunk, views: list[memoryview]) -> None:
        position = chunk.start
        while views:
            got = os.preadv(self._files[chunk.file], views, position)
            if got == 0:
                raise LoadError(f"{self._names[chunk.file]} became shorter while it was read")
            position += got
            full = list(itertools.accumulate(len(view) for view in views))
            whole = sum(end <= got for end in full)
            rest = got - (full[whole - 1] if whole else 0)
            views = views[whole:]
            if rest:
                views[0] = views[0][rest:]

    def _convert(self, chunk: _Chunk, tensor: Stored, source: torch.Tensor) -> None:
        ((offset, length),) = self._prepared(chunk)
        target = self._memory.tensor[offset : offset + length].view(tensor.dtype)
        target.copy_(source.view(tensor.stored))


def _is_near(offset: int, tensor: Stored) -> bool:
    plain = tensor.stored is tensor.dtype and tensor.length >= LARGE_BYTES
    return plain and 0 < (offset - tensor.start) % PAGE_BYTES < NEAR_BYTES


def _converting(tensor: Stored, offset: int, following: int, limit: int) -> Iterator[_Chunk]:
    step = max(1, limit // tensor.stored.itemsize)
    elements = tensor.length // tensor.stored.itemsize
    for first in range(0, elements, step):
        count = min(step, elements - first)
        place = offset + first * tensor.dtype.itemsize, count * tensor.dtype.itemsize
        start = tensor.start + first * tensor.stored.itemsize
        end = following if first + count == elements else sum(place)
        yield _Chunk(tensor.file, start, count * tensor.stored.itemsize, (place,), end, tensor)


def _view(memory: torch.Tensor, offset: int, tensor: Stored) -> torch.Tensor:
    if not tensor.length:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return memory[offset : offset + tensor.final_bytes].view(tensor.dtype).reshape(tensor.shape)
