"""Finds what memory a module's parameters and buffers are in, and where it goes in a contiguous image."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

ALIGNMENT = 512
"""Bytes: what torch's own CUDA allocator gives, and enough for every vector load."""


class NotImageableError(Exception):
    """A module has tensors that cannot be moved by their bytes; the text says which."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a tensor's storage that go to ``offset`` of the image. Pieces of tied tensors are one."""

    storage: torch.UntypedStorage
    start: int
    offset: int
    length: int

    def source(self) -> torch.Tensor:
        """Return the bytes as a tensor where they are now."""
        source = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        source.set_(self.storage, self.start, (self.length,), (1,))
        return source


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter or buffer lies in the image."""

    tensor: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In bytes; -1 = it has no elements, and so no place."""


@dataclass(frozen=True, slots=True)
class Layout:
    """All of a module: what to copy, and what then points where."""

    pieces: tuple[Piece, ...]
    places: tuple[Place, ...]
    total_bytes: int
    """Of the image, a multiple of :data:`ALIGNMENT`."""


def find_layout(module: torch.nn.Module) -> Layout:
    """Return the layout of a module's parameters and buffers, non-persistent ones included.

    Memory that several of them share is there once. Raises :class:`NotImageableError`.
    """
    tensors = list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())
    spans = [_Span(tensor) for tensor in tensors]
    pieces: list[Piece] = []
    total = 0
    for group in _overlapping(span for span in spans if span.length):
        base = group[0].begin
        seen = set()
        for span in group:
            span.offset = total + span.begin - base
            if span.offset % span.tensor.element_size():
                raise NotImageableError("tensors of several types share memory")
            key = span.begin, span.length
            if key not in seen:
                seen.add(key)
                pieces.append(span.piece())
        total = align(total + max(span.begin + span.length for span in group) - base)
    return Layout(tuple(pieces), tuple(span.place() for span in spans), total)


def align(size: int) -> int:
    """Return the next multiple of :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def point(places: Iterable[Place], slab: torch.Tensor) -> None:
    """Have each parameter and buffer be a view of ``slab`` (uint8, as large as the image)."""
    typed: dict[torch.dtype, torch.Tensor] = {}
    for place in places:
        if place.offset < 0:
            place.tensor.data = torch.empty(place.shape, dtype=place.dtype, device=slab.device)
            continue
        memory = typed.get(place.dtype)
        if memory is None:
            memory = typed[place.dtype] = slab.view(place.dtype)
        start = place.offset // place.dtype.itemsize
        place.tensor.data = memory.as_strided(place.shape, place.stride, start)


def unpoint(places: Iterable[Place], placeholders: dict[torch.dtype, torch.Tensor]) -> None:
    """Have each parameter and buffer be of size zero: real, not meta, so that ``.data`` can be set again."""
    for place in places:
        empty = placeholders.get(place.dtype)
        if empty is None:
            empty = placeholders[place.dtype] = torch.empty(0, dtype=place.dtype)
        place.tensor.data = empty


class _Span:
    """The bytes that one tensor reaches, by address."""

    __slots__ = ("begin", "length", "offset", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        _check(tensor)
        self.tensor = tensor
        self.begin = tensor.data_ptr()
        self.offset = -1
        reach = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        self.length = (reach + 1) * tensor.element_size() if tensor.numel() else 0

    def piece(self) -> Piece:
        storage = self.tensor.untyped_storage()
        return Piece(storage, self.begin - storage.data_ptr(), self.offset, self.length)

    def place(self) -> Place:
        tensor = self.tensor
        return Place(tensor, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), self.offset)


def _overlapping(spans: Iterable[_Span]) -> Iterator[list[_Span]]:
    """Yield the spans in groups that share memory, in the order in which their first ones were given."""
    numbered = sorted(
        enumerate(spans), key=lambda entry: (str(entry[1].tensor.device), entry[1].begin)
    )
    groups: list[list[tuple[int, _Span]]] = []
    end = 0
    for number, span in numbered:
        last = groups[-1][0][1] if groups else None
        if last is not None and last.tensor.device == span.tensor.device and span.begin < end:
            groups[-1].append((number, span))
            end = max(end, span.begin + span.length)
        else:
            groups.append([(number, span)])
            end = span.begin + span.length
    for group in sorted(groups, key=lambda group: min(number for number, _ in group)):
        yield [span for _, span in group]


def _check(tensor: torch.Tensor) -> None:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if not plain:
        raise NotImageableError(f"it has tensors of type {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise NotImageableError(
            f"it has tensors of layout {tensor.layout} on {tensor.device.type}, quantised: "
            f"{tensor.is_quantized}"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise NotImageableError("it has conjugated or negated views")
