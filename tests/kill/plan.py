"""What a life that is killed begins with: its plan, the host that it runs, and a line to its killer."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.clock import SystemClock
from modelhostd.adapters.database import FILE_NAME, SqliteDatabase
from modelhostd.adapters.downloads import HubDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.hub import HubConfig
from modelhostd.adapters.trees import TreeStore
from modelhostd.adapters.uploads import UploadStore
from modelhostd.host import Host, HostConfig
from modelhostd.host.registry import History
from tests.fakes.devices import FakeDevices, sim
from tests.fakes.workers import FakeWorkers

REPOS = 4
REVISIONS = ("main", "v2")
HISTORY = 1500
BUDGET = 2_000


@dataclass(frozen=True)
class Plan:
    """One life of the child: what it begins with. Equal plans make equal choices."""

    number: int
    seed: str
    home: Path
    endpoint: str
    starts: Mapping[str, int] = field(default_factory=dict)
    """The sequence that each watcher wants to begin at."""
    calm: bool = False
    """Take up what the last life left, bring it to its end and stop, instead of making traffic."""
    request: tuple[str, str] = ("", "")
    """A request id and the operation that it was answered with before."""
    boot: str = ""
    """The boot of the machine that this life belongs to; empty: the real one."""


class PulseAt:
    """Tells the killer that something happened: one byte each, none when nobody reads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, False)

    def __call__(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, b".")


def make_host(plan: Plan) -> tuple[Host, FileStore]:
    """Return a host over the real database, downloads and files."""
    store = BlobStore(StoreConfig(plan.home, sync_bytes=1024, reserve_bytes=0))
    trees = TreeStore(store)
    files = FileStore(store, trees)
    host = Host(
        HostConfig(
            budgets={"sim-0": BUDGET}, history=History(count=HISTORY, ring=64), keep_operations=40
        ),
        clock=SystemClock(),
        # Short, so that the log is copied into the database between commits, and killed at that.
        database=SqliteDatabase(plan.home / FILE_NAME, idle_s=0.004),
        devices=FakeDevices(sim(0, BUDGET)),
        downloads=HubDownloads(HubConfig(endpoint=plan.endpoint), store, trees),
        uploads=UploadStore(store, trees),
        files=files,
        workers=FakeWorkers(),
    )
    return host, files
