"""Files that hold secrets: believed when nobody else can read them, read again when they change."""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass

FILE_BYTES_MAX = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file with secrets is."""

    path: Path
    guarded: bool = False
    """Whether somebody else keeps readers out (systemd's credentials): its mode is not looked at."""
    required: bool = True
    """Whether it is an error that it is not there."""


class Unreadable(ValueError):
    """Content that cannot be used; ``str()`` says why, without what it holds."""


class SecretFile(Generic[T]):
    """One such file and what it says. Thread-safe."""

    def __init__(self, place: Place, parse: Callable[[str], T]) -> None:
        """``parse`` returns what a text says, or raises Unreadable."""
        self.place = place
        self._parse = parse
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] = ()
        self._value: T | None = None

    def value(self) -> T | None:
        """Return what the file says now; None where it is not there and need not be.

        Raises AUTHENTICATION_REQUIRED when the file or its content cannot be used.
        """
        place, shown = self.place, str(self.place.path)
        with self._lock:
            try:
                fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                if place.required:
                    raise unusable(shown, "it is not there") from None
                return None
            except OSError as error:
                raise unusable(shown, error.strerror or "it cannot be read") from error
            try:
                facts = os.fstat(fd)
                stamp = (facts.st_ino, facts.st_mtime_ns, facts.st_size, facts.st_mode)
                if stamp != self._stamp:
                    self._stamp, self._value = (), None
                    self._value = self._read(fd, facts)
                    self._stamp = stamp
            finally:
                os.close(fd)
            return self._value

    def _read(self, fd: int, facts: os.stat_result) -> T:
        shown = str(self.place.path)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > FILE_BYTES_MAX:
            raise unusable(shown, "it is no file of credentials")
        if not self.place.guarded:
            if facts.st_mode & 0o077:
                raise unusable(shown, "others may read it: chmod 600")
            if facts.st_uid not in {0, os.geteuid()}:
                raise unusable(shown, "it belongs to another user")
        data = b""
        while more := os.read(fd, FILE_BYTES_MAX + 1 - len(data)):
            data += more
        try:
            return self._parse(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise unusable(shown, "it is no UTF-8") from None
        except Unreadable as error:
            raise unusable(shown, str(error)) from None


def unusable(kept_in: str, why: str) -> ModelhostError:
    """Return AUTHENTICATION_REQUIRED for a variable or a file that cannot be used."""
    return ModelhostError(
        Reason.AUTHENTICATION_REQUIRED,
        f"{kept_in} cannot be used for credentials: {why}",
        {"source": "", "credential": f"{kept_in} cannot be used"},
    )
