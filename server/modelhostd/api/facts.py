"""What the daemon is told about itself when it starts: versions, addresses, what it can reach.

The composition root gives it; nothing of it is found out here.
"""

import os
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Protocol

import google.protobuf
import grpc

from modelhostd.core.values import dataclass


class ProcessSetting(Protocol):
    """A setting of the process that matters for speed, and whether it took effect."""

    @property
    def setting(self) -> str:
        """What it is: ``M_ARENA_MAX``."""

    @property
    def value(self) -> str:
        """The value that is wanted."""

    @property
    def effective(self) -> bool:
        """Whether it acts."""

    @property
    def message(self) -> str:
        """Why not."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend that this host knows; ``*`` among its tasks = any."""

    id: str
    tasks: Sequence[str]
    version: str = ""
    available: bool = True
    message: str = ""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """How a source of models does. ``state`` is a name of Host.SourceStatus.State."""

    scheme: str
    endpoint: str
    state: str = "UNKNOWN"
    message: str = ""
    check_time: float = 0.0
    has_credential: bool = False


@dataclass(frozen=True, slots=True)
class CredentialStatus:
    """What may be shown of a credential. ``state`` is a name of Host.Credential.State."""

    origin: str
    kept_in: str
    state: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything GetHost shows that is not the host's state."""

    version: str
    home: Path
    settings: Sequence[ProcessSetting] = ()
    sources: Callable[[], Sequence[SourceStatus]] = tuple
    credentials: Callable[[], Sequence[CredentialStatus]] = tuple
    backends: Callable[[], Sequence[Backend]] | None = None
    """None = not known, and then CheckCompatibility says UNKNOWN."""
    installed: Callable[[str], str] | None = None
    """Returns the version of an installed package, or an empty text."""
    daemon_bytes: Callable[[], int] = lambda: 0
    """Returns the resident memory of this process."""
    hostname: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    python_version: str = ".".join(map(str, sys.version_info[:3]))
    protobuf_version: str = google.protobuf.__version__
    grpcio_version: str = grpc.__version__

    def backend_tasks(self) -> Mapping[str, Collection[str]] | None:
        """Return the tasks of each backend that can be used, or None while that is not known."""
        if self.backends is None:
            return None
        return {b.id: b.tasks for b in self.backends() if b.available}
