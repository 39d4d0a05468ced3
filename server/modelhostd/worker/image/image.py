"""One model's weights in host RAM, and the slabs on its device that are filled from them."""

from collections import Counter
from collections.abc import Callable

import torch

from modelhostd.worker.image.arena import Block, HostArena
from modelhostd.worker.image.descriptions import describe_state
from modelhostd.worker.image.devices import Device
from modelhostd.worker.image.layout import Layout, Place, align, find_layout, point, unpoint
from modelhostd.worker.image.part import Part

WASTE = 8
"""Parts of which more than one in so many bytes is not used by the module are packed anew."""


class Image:
    """The image of a module whose parameters and buffers are views of it, or of slabs, or of nothing.

    Made empty at the begin of a load: what the backend reads into ``memory`` stays where it is, ``adopt`` takes the
    rest, so that there are one or two parts. Without a device the module's tensors are views of the image itself, which then is
    the only copy. With one, ``evict`` and ``swap_in`` take the slabs away and bring them back. One thread at a time, while nothing
    runs in the module.
    """

    def __init__(self, device: Device | None, arena: HostArena) -> None:
        self._device = device
        self._arena = arena
        self._parts: list[Part] = []
        self._unused: list[Part] = []
        self._places: tuple[Place, ...] = ()
        self._has_host = True

    @property
    def device_bytes(self) -> int:
        """Bytes that the model holds on its device while it is there; 0 = nothing was adopted."""
        return sum(part.size for part in self._parts) if self._places else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of host RAM that stay when the model leaves its device; 0 = it cannot come back."""
        return self.device_bytes if self._device is not None and self._has_host else 0

    @property
    def is_copy(self) -> bool:
        """Whether what it has of the host is beside the weights on a device, not the weights themselves."""
        return self._device is not None and bool(self._places)

    def memory(self, size: int) -> Part:
        """Return memory that the image will have as a part, to be filled before ``adopt``.

        ``size`` is rounded up to the alignment of tensors. Raises ``MemoryError``.
        """
        part = Part(self._arena.take(align(size)), self._device)
        self._parts.append(part)
        return part

    def restore(self, weights: Block) -> Part:
        """Have memory that was filled before be a part, as one from ``memory`` that was filled now."""
        part = Part(weights, self._device)
        self._parts.append(part)
        return part

    def uses(self, part: Part) -> bool:
        """Whether a part holds weights of the module."""
        return part in self._parts and bool(self._places)

    @property
    def described(self) -> Part | None:
        """The part that tells what lies where in it, as long as the host has it."""
        if not self._places or not self._has_host:
            return None
        return next((part for part in self._parts if part.description), None)

    def adopt(self, module: torch.nn.Module, *, state: bool = False) -> None:
        """Make the image of a module as it is now, and have the module be on its device.

        ``state``: whether what is packed anew may be described by the module's own names. Raises
        :class:`NotImageableError` with nothing changed, ``MemoryError`` and torch's own: ``close`` it then, when the
        module is gone.
        """
        parts = list(self._parts)
        held = sum(part.size for part in parts)
        layout = find_layout(module, [part.tensor for part in parts])
        if held - layout.used_bytes > held // WASTE:
            layout = find_layout(module, ())
            parts = []
        unused = [part for part in self._parts if part not in parts]
        read = next((part.description for part in unused if part.description), b"")
        parts += self._pack(layout)
        self._places = layout.places
        if state and read and len(parts) == 1:
            parts[0].describe(describe_state(module, self._places, read))
        del layout
        unpoint(self._places)
        # What a view of is left somewhere, outside of the module, waits for `close`.
        self._parts, self._unused = parts, unused
        self._unused = [part for part in unused if not part.close()]
        for part in parts:
            part.seal()
        self._point()

    def swap_in(self, cancelled: Callable[[], bool]) -> None:
        """Fill slabs and point the module to them.

        Raises :class:`Cancelled` and what the device raises without memory; the module is then as it was.
        """
        try:
            for part in self._parts:
                part.swap_in(cancelled)
        except BaseException:
            for part in self._parts:
                part.evict()
            raise
        self._point()

    def evict(self) -> bool:
        """Drop the slabs, nothing copied back. False: something else still holds a view of one.

        The module may not be touched from then on until it is swapped in, or ``unpoint`` was called: its tensors are where the
        slabs were. Having each of them be elsewhere takes longer than all the rest.
        """
        if all(part.evict(part.views) for part in self._parts):
            return True
        unpoint(self._places)
        held = [part for part in self._parts if not part.evict()]
        return not held

    def unpoint(self) -> None:
        """Have the tensors of a module that was evicted be of size zero, so that they can be touched."""
        unpoint(self._places)

    def release_host(self) -> int:
        """Let go of the host's copy: the model stays on its device, and cannot leave it and come back.

        Return the bytes of it that something still holds a view of: they go with the module.
        """
        self._has_host = False
        return sum(part.size for part in self._parts if not part.release_host())

    def close(self) -> bool:
        """Free everything; the module is gone. False: something holds a part of it still; ask again."""
        self._places = ()
        self._unused += self._parts
        self._parts = []
        self._unused = [part for part in self._unused if not part.close()]
        return not self._unused

    def _point(self) -> None:
        used = Counter(place.part for place in self._places)
        for index, part in enumerate(self._parts):
            part.views = used[index]
        if self._device is None:
            point(self._places, [part.tensor for part in self._parts], torch.device("cpu"))
            return
        slabs = [part.slab.tensor for part in self._parts if part.slab is not None]
        point(self._places, slabs, self._device.torch_device)

    def _pack(self, layout: Layout) -> list[Part]:
        """Copy what lies in none of the parts into a new one."""
        if not layout.new_bytes:
            return []
        part = self.memory(layout.new_bytes)
        part.prepare(0, part.size)
        for piece in layout.pieces:
            part.tensor[piece.offset : piece.offset + piece.length].copy_(piece.source())
        return [part]
