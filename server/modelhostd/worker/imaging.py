"""The way from a backend's load to an image; torch is imported only where a backend has use for it."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from modelhostd.worker.backend import Backend
from modelhostd.worker.wire.frames import Key
from modelhostd.worker.wire.images import Kept

if TYPE_CHECKING:
    from modelhostd.worker.image.image import Image
    from modelhostd.worker.image.images import Images
    from modelhostd.worker.image.kept import Adoption
    from modelhostd.worker.image.part import Part

log = logging.getLogger("modelhostd.worker")


class Imaging:
    """What the loads of a worker share."""

    def __init__(
        self,
        device: str,
        ready_bytes: int = 0,
        descriptor: int = -1,
        kept: Mapping[Key, Kept] | None = None,
    ) -> None:
        """Prepare; ``ready_bytes`` of host memory are taken now, in a thread, and kept.

        ``descriptor`` is the memory for images, in which an earlier worker left ``kept``; -1 = its own.
        """
        self._device = device
        self._descriptor = descriptor
        self._kept = kept or {}
        self._ready_bytes = ready_bytes
        self._lock = threading.Lock()
        self._images: Images | None = None
        if ready_bytes:
            _ = self.images

    @property
    def images(self) -> "Images":
        """Images, made when the first is asked for: a worker whose backends need no torch has none."""
        with self._lock:
            if self._images is None:
                from modelhostd.worker.image.images import Images

                self._images = Images(self._device, self._ready_bytes, self._descriptor, self._kept)
            return self._images

    def close(self, image: "Image | None") -> None:
        """Free an image whose module is gone."""
        if image is not None:
            self.images.close(image)

    def drop(self, key: Key) -> None:
        """Free what an earlier worker left of an instance, if it did."""
        # What is in use of the arena was taken from here: nothing may be missing when that is made.
        if key in self._kept:
            self.images.inheritance.drop(key)


class Draft:
    """The image of a load in progress."""

    def __init__(self, imaging: Imaging) -> None:
        self._imaging = imaging
        self._image: Image | None = None

    def memory(self, size: int) -> "Part":
        """Return memory for weights; see :attr:`modelhostd.worker.backend.LoadContext.memory`."""
        return self._begun().memory(size)

    def adopt(
        self, key: Key, cancelled: Callable[[], bool], report: Callable[[int, int], None]
    ) -> "Adoption":
        """Begin with what an earlier worker left; see :class:`modelhostd.worker.image.kept.Inheritance`."""
        return self._imaging.images.inheritance.adopt(key, self._begun(), cancelled, report)

    def finish(self, backend: Backend, *, keep: bool) -> "Image | None":
        """Put a loaded backend's module on its device; return what holds its memory, if anything does.

        ``keep``: whether host RAM may be held for it when it leaves the device.
        """
        module = backend.torch_module()
        if module is not None:
            self._adopt(module, state=backend.takes_state)
            image = self._begun()
            # What a backend holds on the device beside its module would stay there without it.
            if image.host_bytes and (not keep or backend.measured_bytes > image.device_bytes):
                image.release_host()
        elif self._image is not None:
            # Memory was taken and there is nothing to move: what is still in use of it stays as it is.
            self._image.evict()
            self._image.release_host()
        image_or_none, self._image = self._image, None
        return image_or_none

    def discard(self) -> None:
        """Free what a load that failed had taken; its backend is gone."""
        image, self._image = self._image, None
        self._imaging.close(image)

    def _begun(self) -> "Image":
        if self._image is None:
            self._image = self._imaging.images.new()
        return self._image

    def _adopt(self, module: Any, *, state: bool) -> None:
        from modelhostd.worker.image.layout import NotImageableError

        try:
            self._begun().adopt(module, state=state)
        except NotImageableError as error:
            log.info("this model cannot be kept in host RAM: %s", error)
            self._begun().evict()
            self._imaging.images.move(module)
