"""One artifact hashed again, with progress, at a pace that may change meanwhile. Blocking."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from modelhostd.adapters.blobs import Stopped
from modelhostd.adapters.file_check import FileCheck
from modelhostd.core.manifest import Manifest
from modelhostd.core.resources import ModelFile, Phase, Progress
from modelhostd.core.transfer import RateMeter
from modelhostd.ports import Pace, StorageFinding

REPORTS_APART_S = 0.1
POLL_S = 0.25
"""How soon a changed pace acts."""
LOW_PRIORITY = 19


class Verifying:
    """One verification, in one thread. ``stop`` ends it."""

    def __init__(
        self,
        check: FileCheck,
        manifest: Manifest,
        tell: Callable[[Progress], None],
        stop: threading.Event,
        pace: Pace | None = None,
    ) -> None:
        self._check = check
        self._manifest = manifest
        self._tell = tell
        self._stop = stop
        self._pace = pace
        self._order = {file.path: place for place, file in enumerate(manifest.files)}
        sums = itertools.accumulate((file.size_bytes for file in manifest.files), initial=0)
        self._before = dict(zip(self._order, sums, strict=False))
        self._meter = RateMeter()
        self._done = 0
        self._told = 0.0

    def run(self) -> Sequence[StorageFinding]:
        """Hash every file; return what is wrong. Raises Stopped."""
        if self._pace is not None:
            # Of this thread alone: it was made for this work and ends with it.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
        found = tuple(self._check.check(self._manifest, deep=True, repair=True, step=self._step))
        total, files = self._manifest.size_bytes, len(self._order)
        self._tell(Progress(Phase.VERIFYING, total, total, files, files, eta_s=0.0))
        return found

    def _step(self, file: ModelFile, position: int) -> None:
        total = self._manifest.size_bytes
        done = min(total, self._before[file.path] + position)
        self._keep_pace(max(0, done - self._done))
        self._done = done
        if self._stop.is_set():
            raise Stopped
        now = time.monotonic()
        if now - self._told < REPORTS_APART_S:
            return
        self._told = now
        rate = self._meter.sample(now, done)
        self._tell(
            Progress(
                phase=Phase.VERIFYING,
                done_bytes=done,
                total_bytes=total,
                done_files=self._order[file.path],
                total_files=len(self._order),
                bytes_per_second=rate,
                eta_s=RateMeter.eta_s(rate, total - done),
                file=file.path,
            )
        )

    def _keep_pace(self, count: int) -> None:
        """Wait for as long as reading so many bytes may take, however the pace changes meanwhile."""
        left = float(count)
        while self._pace is not None and left > 0 and not self._stop.is_set():
            rate = self._pace.bytes_per_second
            wait_s = POLL_S if rate <= 0 else min(POLL_S, left / rate)
            self._stop.wait(wait_s)
            left -= wait_s * max(0.0, rate)
