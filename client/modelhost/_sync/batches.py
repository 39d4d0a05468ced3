# Made from modelhost/_async/batches.py by generate_sync.py: do not edit, change that.
"""Several models at once: each with a result of its own."""

import time
from collections.abc import Iterable, Sequence

from modelhost._batch import SAMPLE_S, Changed, Outcome, ended
from modelhost._errors import ModelhostError
from modelhost._follow import Follow
from modelhost._progress import Report, reporter
from modelhost._sync.operations import OperationHandle
from modelhost._sync.registry import Registry


class Batches(Registry):
    """What ``Client`` does with several models at once."""

    def pull_all(
        self,
        sources: Iterable[str],
        *,
        allow_patterns: Sequence[str] = (),
        ignore_patterns: Sequence[str] = (),
        priority: int = 0,
        rate_limit_bytes_per_second: int = 0,
        allow_unsafe: bool = False,
        refresh: bool = False,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> list[Outcome]:
        """Pull several sources or models; one that fails is no reason for another to.

        Queued in their order, and followed side by side. Returns what became of each, in the order of
        ``sources``, and raises nothing of what one of them failed with: see ``Outcome.error``. The rest
        is as in ``pull``; the limit is that of each, ``timeout`` that of all.
        """
        outcomes: dict[int, Outcome] = {}
        handles: dict[int, OperationHandle] = {}
        asked = list(sources)
        for number, source in enumerate(asked):
            try:
                handles[number] = self.pull(
                    source,
                    allow_patterns=allow_patterns,
                    ignore_patterns=ignore_patterns,
                    priority=priority,
                    rate_limit_bytes_per_second=rate_limit_bytes_per_second,
                    allow_unsafe=allow_unsafe,
                    refresh=refresh,
                    wait=False,
                )
            except ModelhostError as error:
                outcomes[number] = Outcome(source, None, error)
        found = self.wait_all(handles.values(), progress=progress, timeout=timeout)
        for number, outcome in zip(handles, found, strict=True):
            outcomes[number] = Outcome(asked[number], outcome.operation, outcome.error)
        return [outcomes[number] for number in range(len(asked))]

    def wait_all(
        self,
        handles: Iterable[OperationHandle],
        *,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> list[Outcome]:
        """Wait for the end of several operations; return what became of each, in their order.

        A callable for ``progress`` gets each state of each. Those that have not ended after ``timeout``
        seconds have the error Timeout, and go on.
        """
        waited = list(handles)
        started = time.monotonic()
        follows = [Follow(handle.operation, started, timeout) for handle in waited]
        outcomes: dict[int, Outcome] = {}
        with reporter(progress) as report:
            told = Changed(report)
            while len(outcomes) < len(waited):
                pause = SAMPLE_S
                for number, handle in enumerate(waited):
                    if number in outcomes:
                        continue
                    follow = follows[number]
                    try:
                        follow.remaining(time.monotonic())
                        operation = handle.refresh(include_files=True)
                        follow.received(operation)
                    except ModelhostError as error:
                        try:
                            pause = max(pause, follow.broken(error, time.monotonic()))
                        except ModelhostError as last:
                            outcomes[number] = Outcome(handle.name, handle.operation, last)
                        continue
                    told(operation)
                    if handle.done:
                        outcomes[number] = ended(handle.name, operation)
                if len(outcomes) < len(waited):
                    self._transport.pause(pause)
        return [outcomes[number] for number in range(len(waited))]
