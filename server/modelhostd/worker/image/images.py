"""What the images of one worker share: the host arena, and the device that they are swapped into."""

import logging
from collections.abc import Callable, Mapping

import torch

from modelhostd.worker.image.arena import HostArena
from modelhostd.worker.image.devices import make_device
from modelhostd.worker.image.image import Image
from modelhostd.worker.image.kept import Inheritance, rest
from modelhostd.worker.process import collect
from modelhostd.worker.wire.frames import Key
from modelhostd.worker.wire.images import Kept

log = logging.getLogger("modelhostd.worker")


class Images:
    """Makes images and ends them."""

    def __init__(
        self,
        device: str,
        ready_bytes: int = 0,
        descriptor: int = -1,
        kept: Mapping[Key, Kept] | None = None,
    ) -> None:
        """Prepare for the device of an id; ``ready_bytes`` of host memory are kept faulted from now on.

        ``descriptor`` is the memory for images, in which an earlier worker left ``kept``; -1 = its own. Raises
        what torch raises where it cannot use the device.
        """
        self._device = make_device(device)
        held = [place for image in (kept or {}).values() for place in image.ranges]
        self._arena = HostArena("modelhost-images", ready_bytes, descriptor, held)
        self.inheritance = Inheritance(self._arena, kept or {})
        self._arena.fault_ahead()
        self._lingering: list[Image] = []

    def new(self) -> Image:
        """Return an empty image, for a load that begins."""
        return Image(self._device, self._arena)

    def move(self, module: torch.nn.Module) -> None:
        """Put a module that cannot be imaged on the device, tensor by tensor."""
        if self._device is not None:
            module.to(self._device.torch_device)

    def rest(self, image: Image, pause: Callable[[float], object]) -> Kept | None:
        """Hash an image that is loaded, so that it can outlive this worker; None where it cannot, or went."""
        part = image.described
        return rest(part, self._arena, pause) if part is not None else None

    def close(self, image: Image) -> None:
        """End an image whose module is gone. What somebody still holds a view of goes when they let go."""
        if not image.close() or self._lingering:
            # In cycles of what is gone there may be views, and a collection holds everything up: only then.
            collect()
            self._lingering = [other for other in (*self._lingering, image) if not other.close()]
        if self._lingering:
            log.warning(
                "%d images are held by views that outlive their models", len(self._lingering)
            )
