"""Reads the tensors of safetensors files into one piece of memory, with several threads.

A file's bytes are cut into chunks that the threads claim in order; one ``preadv`` scatters a chunk over the aligned
places of its tensors, so that aligning costs nothing. Where the precision differs, a chunk is read beside and
converted into its place. Buffered reads: the page cache is a tier for free.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from modelhostd.core.values import dataclass
from modelhostd.worker.backend import LoadError
from modelhostd.worker.image.layout import align
from modelhostd.worker.own_threads import start_thread

CHUNK_BYTES = 16 * 2**20
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
    """Where each tensor goes, before a byte is read. ``total_bytes`` is what ``read`` needs."""

    def __init__(self, tensors: Sequence[Stored]) -> None:
        """Place tensors, those of a file in the order of their bytes."""
        self._tensors = tensors
        self._offsets: list[int] = []
        total = 0
        for tensor in tensors:
            self._offsets.append(total)
            total += align(tensor.final_bytes)
        self.total_bytes = total

    def read(
        self,
        names: Sequence[str],
        files: Sequence[int],
        memory: Memory,
        advance: Callable[[int], None],
    ) -> dict[str, torch.Tensor]:
        """Read everything and return the tensors by name, as views of ``memory``.

        ``files`` are descriptors, ``names`` what errors call them. ``advance`` is told the bytes that were read, one call at
        a time; what it raises ends the reading. Raises :class:`LoadError` for a file that became shorter, ``OSError`` and
        ``MemoryError``.
        """
        chunks = iter(list(self._chunks()))
        state = _Reading(names, files, memory, advance)
        count = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        threads = [start_thread(state.run, chunks, name=f"read-{n}") for n in range(count)]
        for thread in threads:
            thread.join()
        if state.error is not None:
            raise state.error
        return {
            tensor.name: _view(memory.tensor, offset, tensor)
            for tensor, offset in zip(self._tensors, self._offsets, strict=True)
        }

    def _chunks(self) -> Iterator[_Chunk]:
        places: list[tuple[int, int]] = []
        begin = file = length = end = 0
        for tensor, offset in zip(self._tensors, self._offsets, strict=True):
            plain = tensor.stored is tensor.dtype
            if places and (not plain or file != tensor.file or begin + length != tensor.start):
                yield _Chunk(file, begin, length, tuple(places), end)
                places, length = [], 0
            if not plain:
                yield from _converting(tensor, offset)
                continue
            done = 0
            while done < tensor.length:
                if not places:
                    file, begin, length = tensor.file, tensor.start + done, 0
                part = min(tensor.length - done, CHUNK_BYTES - length)
                places.append((offset + done, part))
                length += part
                done += part
                end = _end(tensor, offset, done)
                if length == CHUNK_BYTES or len(places) == MAX_VECTORS:
                    yield _Chunk(file, begin, length, tuple(places), end)
                    places = []
        if places:
            yield _Chunk(file, begin, length, tuple(places), end)


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
                        beside = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
                    source = beside[: chunk.length]
                    self._read(chunk, [source.numpy().data])
                    self._convert(chunk, chunk.converted, source)
                first = chunk.places[0][0]
                self._memory.filled(first, chunk.end - first)
                with self._lock:
                    self._advance(chunk.length)
            except BaseException as error:
                with self._lock:
                    self.error = self.error or error
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


def _converting(tensor: Stored, offset: int) -> Iterator[_Chunk]:
    step = CHUNK_BYTES // tensor.stored.itemsize
    elements = tensor.length // tensor.stored.itemsize
    for first in range(0, elements, step):
        count = min(step, elements - first)
        place = offset + first * tensor.dtype.itemsize, count * tensor.dtype.itemsize
        start = tensor.start + first * tensor.stored.itemsize
        end = _end(tensor, offset, (first + count) * tensor.dtype.itemsize)
        yield _Chunk(tensor.file, start, count * tensor.stored.itemsize, (place,), end, tensor)


def _end(tensor: Stored, offset: int, done: int) -> int:
    """Return where in memory the bytes end of which ``done`` of a tensor are the last, its padding included."""
    return offset + (align(done) if done == tensor.final_bytes else done)


def _view(memory: torch.Tensor, offset: int, tensor: Stored) -> torch.Tensor:
    if not tensor.length:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return memory[offset : offset + tensor.final_bytes].view(tensor.dtype).reshape(tensor.shape)
