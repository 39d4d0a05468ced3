"""Tells the daemon which images are at rest, so that they outlive this process."""

import contextlib
import logging
import queue
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelhostd.worker.channel import Channel
from modelhostd.worker.imaging import Imaging
from modelhostd.worker.own_threads import start_thread
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire.frames import Key, Kind
from modelhostd.worker.wire.images import Kept, Range

if TYPE_CHECKING:
    from modelhostd.worker.image.image import Image

log = logging.getLogger("modelhostd.worker")


class Keeper:
    """One thread that hashes what was loaded, one image after the other."""

    def __init__(self, imaging: Imaging, channel: Channel) -> None:
        self._imaging = imaging
        self._channel = channel
        self._waiting: queue.SimpleQueue[tuple[Key, Image]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._runs = False

    def keep(self, key: Key, image: "Image") -> None:
        """Have an image outlive this worker, once it is hashed; it is loaded, and read-only."""
        with self._lock:
            if not self._runs:
                start_thread(self._run, name="keeper")
                self._runs = True
        self._waiting.put((key, image))

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            key, image = self._waiting.get()
            try:
                kept = self._imaging.images.rest(image, pause.wait)
            except (MemoryError, OSError):
                log.warning("an image cannot outlive its worker", exc_info=True)
                kept = None
            del image
            if kept is not None:
                self._tell(key, kept)

    def _tell(self, key: Key, kept: Kept) -> None:
        header = worker_pb2.KeptHeader(
            instance=key[0],
            weights_offset=kept.weights.start,
            weights_length=kept.weights.length,
            description_offset=kept.description.start,
            description_length=kept.description.length,
            checksum=kept.checksum,
        )
        with contextlib.suppress(OSError):  # The daemon has gone, and so does this process.
            self._channel.send(Kind.KEPT, 0, 0, key[1], header.SerializeToString())


def from_hello(hello: worker_pb2.HelloRequest) -> Mapping[Key, Kept]:
    """Return what the worker before this one left."""
    return {
        (told.instance, told.generation): Kept(
            Range(told.image.weights_offset, told.image.weights_length),
            Range(told.image.description_offset, told.image.description_length),
            told.image.checksum,
        )
        for told in hello.kept
    }
