"""The memory for images of one place of a worker, as the daemon holds it: from worker to worker, never mapped."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping

from modelhostd.adapters.workers.control import to_kept
from modelhostd.worker.wire import images
from modelhostd.worker.wire.frames import Key
from modelhostd.worker.wire.images import Kept

log = logging.getLogger("modelhostd.workers")

KEPT_MAX = 256
"""Images that outlive a worker at most: what the next one is told of them is one frame."""


class Leavings:
    """What one worker would leave behind: the images that it told to be whole, of the instances that it has."""

    def __init__(self) -> None:
        self._bytes: dict[Key, int] = {}
        self._kept: dict[Key, Kept] = {}
        self.inherited: frozenset[Key] = frozenset()
        """What it was told of at its start."""

    def inherit(self, kept: Mapping[Key, Kept]) -> None:
        """Note what it is told of at its start."""
        self.inherited = frozenset(kept)

    def begin(self, key: Key) -> None:
        """Note an instance that is to be loaded."""
        self._bytes[key] = 0

    def loaded(self, key: Key, size: int) -> None:
        """Note what a loaded instance holds: its weights can be no more."""
        self._bytes[key] = size

    def adopted(self, key: Key, size: int, kept: Kept) -> None:
        """Note an instance whose image was there before."""
        self._bytes[key] = size
        self._kept[key] = kept

    def told(self, generation: int, header: bytes) -> None:
        """Take what the worker says of an instance's image. Raises DecodeError."""
        instance, kept = to_kept(header)
        # Of others it was told too late: they are on their way out.
        if (instance, generation) in self._bytes:
            self._kept[instance, generation] = kept

    def forget(self, key: Key) -> None:
        """Note an instance that is freed."""
        self._bytes.pop(key, None)
        self._kept.pop(key, None)

    def of(self, keys: Iterable[Key], before: Mapping[Key, Kept]) -> dict[Key, Kept]:
        """Return what there is of these instances, and behind them what it did not take over of the one ``before``.

        Nothing at all where the worker's numbers cannot be true.
        """
        found = {key: self._kept[key] for key in keys if key in self._kept}
        sound = all(kept.sound(self._bytes[key]) for key, kept in found.items())
        found |= before
        if not sound or images.overlap(r for kept in found.values() for r in kept.ranges):
            log.error("%d images cannot be where their worker said they are", len(found))
            return {}
        return found


class ImageMemory:
    """Loop thread only. What takes long happens in a thread, one after the other; ``settled`` waits for it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._fd = -1
        self._kept: dict[Key, Kept] = {}
        self._work: asyncio.Future[None] | None = None

    @property
    def kept(self) -> Mapping[Key, Kept]:
        """What outlived the last worker, and is not dropped."""
        return self._kept

    @property
    def held_bytes(self) -> int:
        """RAM that all of it takes now."""
        return images.held_bytes(self._fd) if self._fd >= 0 else 0

    def open(self) -> int:
        """Return the descriptor for a worker that starts to inherit. Raises ``OSError``."""
        if self._fd < 0:
            self._fd = images.create(f"modelhost-{self._device}-images")
        return self._fd

    def keep(self, kept: Mapping[Key, Kept]) -> None:
        """Hold on to these alone, of a worker that is reaped; the memory of all else is given back."""
        self._kept = dict(list(kept.items())[:KEPT_MAX])
        if self._fd >= 0:
            self._punch()

    def drop(self, key: Key) -> None:
        """Give an image's memory back; no worker may have been told of it."""
        if self._kept.pop(key, None) is not None:
            self._punch()

    def adopted(self, key: Key) -> None:
        """Note that a worker manages an image now, or freed it."""
        self._kept.pop(key, None)

    async def settled(self) -> None:
        """Wait until all is given back that was to be."""
        while self._work is not None and not self._work.done():
            await asyncio.wait((self._work,))

    def close(self) -> None:
        """Let go of everything."""
        fd, self._fd = self._fd, -1
        self._kept = {}
        if fd >= 0:
            # Nothing is punched from now on, and what is being punched ends first.
            self._then(lambda: os.close(fd))

    def _punch(self) -> None:
        fd, kept = self._fd, [r for image in self._kept.values() for r in image.ranges]
        self._then(lambda: images.punch_all_but(fd, kept))

    def _then(self, work: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._work = loop.create_task(self._run(self._work, work))

    async def _run(self, before: "asyncio.Future[None] | None", work: Callable[[], None]) -> None:
        if before is not None:
            await asyncio.wait((before,))
        try:
            await asyncio.get_running_loop().run_in_executor(None, work)
        except OSError as error:
            log.error("memory for images of %s: %s", self._device, error.strerror)
