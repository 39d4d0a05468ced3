"""A program: as kill_loop.py, but the power fails: what the file system has not written is lost too.

``python power_cut.py ROOT ENDPOINT CUTS SEED [SECONDS]``, as root. The home lies on an ext4 file system in
an image file, mounted over a loop device. After each kill the image is copied as it is, and life goes on
on the copy, whose journal is replayed when it is mounted, in what passes for another boot.

What is simulated: all that is only in the page cache of the file system is gone, files, names and the
database's log alike; what reached the block device is there, in the order of ext4 (``data=ordered``).
What is not: a disk that reorders, tears or forgets writes it has taken and not flushed, and any other file
system. ext4 also writes more than it was asked to: an fsync of one file commits all names that changed
before it. What POSIX alone promises is held by ``sync_ledger.py``.
"""

import math
import subprocess
import sys
import time
from pathlib import Path

from tests.kill.kill_loop import Loop, prepare, report
from tests.kill.look import Disk
from tests.support import wait_until

IMAGE_BYTES = 32 << 20
SETTLED_S = 0.01
"""Longer than the grain of a file's times."""


class PowerLoop(Loop):
    """One disk, whose machine loses its power again and again."""

    def __init__(self, root: Path, endpoint: str, seed: int) -> None:
        self._root = root
        self._cuts = 0
        self._mounted = root / "disk"
        self._mounted.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(self._image))
        self._mount()
        super().__init__(self._mounted / "home", endpoint, seed)
        self._record = root / "record"

    @property
    def _image(self) -> Path:
        # Each in a file of its own: a loop device that somebody still looks at is taken again for the
        # file that it had, with what it remembers of it.
        return self._root / f"image{self._cuts}"

    def boot(self, number: int) -> str:
        """Return the name of the boot that a life belongs to: each has its own."""
        return f"boot {number}"

    def cut_off(self) -> None:
        """Go on with what the disk has now."""
        self._disk.close()
        last = self._image
        self._cuts += 1
        _copy(last, self._image)
        self.unmount()
        self._mount()
        last.unlink()
        seen = self._disk.artifacts_seen
        self._disk = Disk(self._home)
        self._disk.artifacts_seen = seen

    def unmount(self) -> None:
        """Take the disk out."""
        _run("umount", str(self._mounted))

    def close(self) -> None:
        """Let go of the disk and take it out."""
        self._disk.close()
        self.unmount()

    def _mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self._mounted))


def _copy(image: Path, copy: Path) -> None:
    """Copy an image at one moment: again, if it was written to meanwhile."""
    while True:
        wait_until(lambda: time.time_ns() - _written(image) > SETTLED_S * 1e9)
        before = _written(image)
        _run("cp", "--sparse=always", str(image), str(copy))
        if _written(image) == before:
            return


def _written(image: Path) -> int:
    return image.stat().st_mtime_ns


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


def main(root: Path, endpoint: str, cuts: int, seed: int, seconds: float = math.inf) -> None:
    """Run the loop and print what it saw."""
    prepare()
    loop = PowerLoop(root, endpoint, seed)
    try:
        loop.run(cuts, seconds)
    finally:
        loop.close()
    report(loop)


if __name__ == "__main__":
    place, hub, count, number, *limit = sys.argv[1:]
    main(Path(place), hub, int(count), int(number), *map(float, limit))
