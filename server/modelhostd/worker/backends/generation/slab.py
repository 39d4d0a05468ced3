"""Keys and values of the sequences that share passes, in memory with room for more: a token is written to its place.

The library's own cache is copied whole for each token (``torch.cat``), and was for each sequence that came or went.
"""

import functools
from typing import Any

import torch

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [sequences, heads, length, size] of each layer."""

SPARE_TOKENS = 64
SPARE_SHARE = 4
"""Room for tokens to come: so many, or this part of what is there, before all is copied to a larger place."""


class Slab:
    """Rows of one width whose sequences all end in the same column, so that the next token of each is written to one.

    What is at the left of a shorter sequence is finite: a mask hides it. Where a method fails nothing has changed.
    """

    def __init__(self, most_tokens: int) -> None:
        """``most_tokens``: rows times columns that are taken at most, where the sequences themselves do not need more."""
        import transformers

        self._most_tokens = most_tokens
        self._layers: list[Any] = []
        self._room = (0, 0)
        """Rows and columns that there is memory for."""
        self._columns = slice(0, 0)
        """Those in use."""
        self.rows = 0
        self.cache: Any = transformers.DynamicCache()
        """The library's object, for the model."""

    @property
    def width(self) -> int:
        """Tokens of the longest sequence, or what longer ones have left behind."""
        return self._columns.stop - self._columns.start

    def add(self, layers: Layers) -> None:
        """Put one more sequence behind the others."""
        length = layers[0][0].shape[-2]
        rows, columns = self._room
        at = self._columns.stop
        if self.rows == rows or length > at or at >= columns:
            self._move(self.rows + 1, max(self.width, length), layers)
            at = self._columns.stop
        start = min(self._columns.start, at - length) if self.rows else at - length
        for layer, (keys, values) in zip(self._layers, layers, strict=True):
            for room, part in ((layer.room_keys, keys), (layer.room_values, values)):
                # What others have left there.
                room[: self.rows, :, start : self._columns.start] = 0
                room[self.rows, :, start : at - length] = 0
                room[self.rows, :, at - length : at] = part[0]
        self.rows += 1
        self._show(start, at)

    def copy(self, row: int, length: int) -> Layers:
        """Return a copy of what is there of one sequence."""
        at = slice(self._columns.stop - length, self._columns.stop)
        return [
            (
                layer.room_keys[row : row + 1, :, at].clone(),
                layer.room_values[row : row + 1, :, at].clone(),
            )
            for layer in self._layers
        ]

    def remove(self, row: int, longest: int) -> None:
        """Take a sequence out: the last one comes to its place. ``longest``: of those that are left, in tokens."""
        self.rows -= 1
        if not self.rows:
            self.clear()
            return
        if row < self.rows:
            for layer in self._layers:
                for room in (layer.room_keys, layer.room_values):
                    room[row, :, self._columns] = room[self.rows, :, self._columns]
        self._show(self._columns.stop - longest, self._columns.stop)

    def clear(self) -> None:
        """Forget all, and give the memory back."""
        self._layers = self.cache.layers = []
        self._room, self._columns, self.rows = (0, 0), slice(0, 0), 0

    def make_room(self) -> None:
        """See to it that the next token of each has a place."""
        if self._columns.stop >= self._room[1]:
            self._move(self.rows, self.width, [])

    def written(self) -> None:
        """Count in the tokens that a pass has written."""
        self._columns = slice(self._columns.start, self._columns.stop + 1)

    def _move(self, rows: int, width: int, like: Layers) -> None:
        """Move to a place with room for so many, and some more; the first one is made for what is ``like`` it."""
        # Twice the rows each time, as far as what is reserved allows.
        columns = width + max(SPARE_TOKENS, width // SPARE_SHARE)
        room = 1 << (rows - 1).bit_length()
        if room * columns > self._most_tokens:
            room = rows
            columns = max(width + 1, min(columns, self._most_tokens // rows))
        old, kept = self._columns, slice(width - self.width, width)
        made = []
        for n in range(len(self._layers or like)):
            layer = self._layers[n] if self._layers else None
            first = (layer.room_keys, layer.room_values) if layer else like[n]
            rooms = [
                part.new_empty((room, part.shape[1], columns, part.shape[3])) for part in first
            ]
            if layer is not None:
                for now, before in zip(rooms, first, strict=True):
                    now[: self.rows, :, kept] = before[: self.rows, :, old]
            made.append(_layer_type()(*rooms))
        self._layers = self.cache.layers = made
        self._room = (room, columns)
        self._show(kept.start, width)

    def _show(self, start: int, stop: int) -> None:
        self._columns = slice(start, stop)
        for layer in self._layers:
            layer.show(self.rows, start, stop)


@functools.cache
def _layer_type() -> Any:
    """Return the class of a layer: the library's own, for models that ask what it is."""
    from transformers import cache_utils

    library: Any = cache_utils.DynamicLayer

    class SlabLayer(library):  # type: ignore[misc]
        """One layer of a slab; ``keys`` and ``values`` are what of it is in use."""

        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().__init__()
            self.room_keys, self.room_values = keys, values
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True

        def show(self, rows: int, start: int, stop: int) -> None:
            """Use so many rows, and these columns."""
            self._start, self._stop = start, stop
            self._own_keys, self._own_values = self.room_keys[:rows], self.room_values[:rows]
            self.keys = self._own_keys.narrow(2, start, stop - start)
            self.values = self._own_values.narrow(2, start, stop - start)

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Write the next token of each row; return all that is there."""
            at, start = self._stop, self._start
            self._own_keys.narrow(2, at, 1).copy_(key_states)
            self._own_values.narrow(2, at, 1).copy_(value_states)
            self._stop = at + 1
            self.keys = self._own_keys.narrow(2, start, at + 1 - start)
            self.values = self._own_values.narrow(2, start, at + 1 - start)
            return self.keys, self.values

    return SlabLayer
