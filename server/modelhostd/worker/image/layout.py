"""Finds what memory a module's parameters and buffers are in, and where it goes in a contiguous image."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from modelhostd.core.values import dataclass

ALIGNMENT = 512
"""Bytes: what torch's own CUDA allocator gives, and enough for every vector load."""


class NotImageableError(Exception):
    """A module has tensors that cannot be moved by their bytes; the text says which."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a tensor's storage that go to ``offset`` of the last part of the image."""

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
    """Where a parameter or buffer lies: ``offset`` bytes from the start of part ``part`` of the image."""

    tensor: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    part: int
    """-1 = nowhere: it has no elements."""
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All of a module: what to copy into a new part of the image, and what then points where."""

    pieces: tuple[Piece, ...]
    places: tuple[Place, ...]
    new_bytes: int
    """Size of the new part, the last one; a multiple of :data:`ALIGNMENT`."""
    used_bytes: int
    """Of the parts that were there, what the module uses, each tensor with its alignment."""


def find_layout(module: torch.nn.Module, parts: Sequence[torch.Tensor]) -> Layout:
    """Return the layout of a module's parameters and buffers, non-persistent ones included.

    What lies in one of ``parts`` (uint8) stays there; the rest goes to a new part behind them, and memory that several
    tensors share goes there once. Raises :class:`NotImageableError`.
    """
    tensors = list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())
    spans = [_Span(tensor) for tensor in tensors]
    pieces: list[Piece] = []
    total = used = 0
    for group in _overlapping(span for span in spans if span.length):
        begin, end = group[0].begin, max(span.end for span in group)
        part, base = _find(parts, group[0], end)
        if part == len(parts):
            base = begin - total
            total = align(total + end - begin)
        else:
            used += align(end - begin)
        seen = set()
        for span in group:
            span.part, span.offset = part, span.begin - base
            if span.offset % span.tensor.element_size():
                raise NotImageableError("tensors of several types share memory")
            if part == len(parts) and (key := (span.begin, span.length)) not in seen:
                seen.add(key)
                pieces.append(span.piece())
    return Layout(tuple(pieces), tuple(span.place() for span in spans), total, used)


def align(size: int) -> int:
    """Return the next multiple of :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def point(places: Iterable[Place], parts: Sequence[torch.Tensor], device: torch.device) -> None:
    """Have each parameter and buffer be a view of its part, which is on ``device``."""
    typed: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    for place in places:
        dtype = place.dtype
        if place.part < 0:
            place.tensor.data = torch.empty(place.shape, dtype=dtype, device=device)
            continue
        memory = typed.get((place.part, dtype))
        if memory is None:
            memory = typed[place.part, dtype] = parts[place.part].view(dtype)
        start = place.offset // dtype.itemsize
        place.tensor.data = memory.as_strided(place.shape, place.stride, start)


def unpoint(places: Iterable[Place]) -> None:
    """Have each parameter and buffer be of size zero: real, not meta, so that ``.data`` can be set again."""
    empty: dict[torch.dtype, torch.Tensor] = {}
    for place in places:
        if place.dtype not in empty:
            empty[place.dtype] = torch.empty(0, dtype=place.dtype)
        place.tensor.data = empty[place.dtype]


class _Span:
    """The bytes that one tensor reaches, by address."""

    __slots__ = ("begin", "end", "length", "offset", "part", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        _check(tensor)
        self.tensor = tensor
        self.part = self.offset = -1
        self.begin = tensor.data_ptr()
        reach = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        self.length = (reach + 1) * tensor.element_size() if tensor.numel() else 0
        self.end = self.begin + self.length

    def piece(self) -> Piece:
        storage = self.tensor.untyped_storage()
        return Piece(storage, self.begin - storage.data_ptr(), self.offset, self.length)

    def place(self) -> Place:
        tensor = self.tensor
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return Place(tensor, tensor.dtype, shape, stride, self.part, self.offset)


def _find(parts: Sequence[torch.Tensor], first: _Span, end: int) -> tuple[int, int]:
    """Return the part that memory lies in, and where that begins; (number of parts, 0) = in none."""
    if first.tensor.device.type == "cpu":
        for index, part in enumerate(parts):
            begin = part.data_ptr()
            if begin <= first.begin and end <= begin + part.numel():
                return index, begin
    return len(parts), 0


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
            end = max(end, span.end)
        else:
            groups.append([(number, span)])
            end = span.end
    for group in sorted(groups, key=lambda group: min(number for number, _ in group)):
        yield [span for _, span in group]


def _check(tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise NotImageableError(f"it has tensors of type {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise NotImageableError(
            f"it has tensors of layout {tensor.layout} on {tensor.device.type}, quantised: "
            f"{tensor.is_quantized}"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise NotImageableError("it has conjugated or negated views")
