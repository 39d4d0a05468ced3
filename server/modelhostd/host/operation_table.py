"""Operations as they are: read with their live progress, and moved from state to state.

Progress is not part of the committed state: it is a sample, replaced by the next one and lost with the
daemon.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelhostd.core import operations as rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import (
    FINAL_STATES,
    Operation,
    OperationState,
    Phase,
    Progress,
)
from modelhostd.core.state import Edit
from modelhostd.host.operation_watch import watch_operation
from modelhostd.host.registry import Registry
from modelhostd.host.samples import Samples


class OperationTable:
    """Every operation of the host, with live progress beside the committed rows."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._samples = Samples()

    # --- reading --------------------------------------------------------------------------------

    def get(self, key: str) -> Operation:
        """Return an operation with its newest progress, or raise OPERATION_NOT_FOUND."""
        return self.live(self._registry.committed.operation(key))

    def list(self) -> Sequence[Operation]:
        """Return every operation, newest first."""
        places = self._places()
        found = self._registry.committed.operations.values()
        newest = sorted(found, key=lambda o: (-o.create_time, o.id))
        return [self._live(o, places.get(o.id, 0)) for o in newest]

    def live(self, operation: Operation) -> Operation:
        """Return an operation as stored, with live progress and queue position added."""
        queued = operation.state is OperationState.QUEUED
        return self._live(operation, self._places().get(operation.id, 0) if queued else 0)

    def _live(self, operation: Operation, place: int) -> Operation:
        if operation.state in FINAL_STATES:
            return operation
        progress = self._samples.get(operation.id) or operation.progress
        return replace(operation, progress=progress, queue_position=place)

    def _places(self) -> Mapping[str, int]:
        """Return the place of each waiting operation among those of its kind, from 1 on."""
        found = self._registry.committed.operations.values()
        return {
            operation.id: place
            for kind in {o.kind for o in found if o.state is OperationState.QUEUED}
            for place, operation in enumerate(rules.queue(found, kind), start=1)
        }

    def samples_after(self, number: int) -> tuple[int, Mapping[str, Progress]]:
        """Return the number of the newest sample, and the progress that is newer than ``number``."""
        return self._samples.after(number)

    def watch(self, key: str) -> AsyncGenerator[Operation, None]:
        """Yield the operation now, at each change, at most 4 samples a second; end after the end.

        Raises OPERATION_NOT_FOUND.
        """
        now = self.get(key)
        return watch_operation(self._registry.journal, self._samples, self._find, self.live, now)

    def _find(self, key: str) -> Operation | None:
        found = self._registry.committed.operations.get(key)
        return self.live(found) if found is not None else None

    async def wait(self, key: str, timeout_s: float | None) -> Operation:
        """Return the operation once it has ended, or as it is when ``timeout_s`` has passed."""
        changed = asyncio.Event()
        with self._registry.journal.changed.subscribed(changed):
            try:
                async with asyncio.timeout(timeout_s):
                    while (operation := self.get(key)).state not in FINAL_STATES:
                        changed.clear()
                        await changed.wait()
                    return operation
            except TimeoutError:
                return self.get(key)

    # --- what becomes of them -------------------------------------------------------------------

    def report(self, key: str, progress: Progress) -> None:
        """Take a progress sample of an unfinished operation."""
        if self._unfinished(key) is not None:
            self._samples.report(key, progress)

    def progress(self, key: str) -> Progress:
        """Return the newest progress of an operation."""
        return self._samples.get(key) or Progress()

    def running(self, key: str, phase: Phase = Phase.NONE) -> Sequence[Edit]:
        """Return the edits that set an operation RUNNING, with its first phase."""
        operation = self._unfinished(key)
        if operation is None:
            return ()
        progress = replace(operation.progress, phase=phase)
        self.report(key, progress)
        moved = rules.moved(operation, OperationState.RUNNING, self._registry.clock.time())
        return [rules.edit(replace(moved, progress=progress))]

    def succeeded(self, key: str, result: Mapping[str, Any]) -> Sequence[Edit]:
        """Return the edits that end an operation well."""
        operation = self._unfinished(key)
        if operation is None:
            return ()
        progress = replace(self._samples.get(key) or operation.progress, phase=Phase.NONE)
        done = rules.succeeded(operation, self._registry.clock.time(), result, progress)
        return [rules.edit(done)]

    def failed(self, key: str, error: ModelhostError) -> Sequence[Edit]:
        """Return the edits that end an operation with an error (CANCELLED for that reason)."""
        operation = self._unfinished(key)
        if operation is None:
            return ()
        progress = self._samples.get(key) or operation.progress
        return [rules.edit(rules.failed(operation, self._registry.clock.time(), error, progress))]

    def _unfinished(self, key: str) -> Operation | None:
        """Return the operation unless it ended, or was undone because its commit failed."""
        operation = self._registry.decided.operations.get(key)
        if operation is None or operation.state in FINAL_STATES:
            return None
        return operation
