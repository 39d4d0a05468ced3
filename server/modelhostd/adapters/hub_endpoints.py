"""Several endpoints for one Hub: the first that can be reached answers, and the next goes on for it.

A mirror is asked for the commit that the plan names, and what it sends is held against the plan's
digests: it can be out of date or broken, and never change what is fetched. Each endpoint sees the
credential of its own origin only.
"""

import threading
from collections.abc import Sequence

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.hub import Hub
from modelhostd.adapters.source import Body, Reader
from modelhostd.adapters.wire import Transient
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Source
from modelhostd.core.transfer import RetryPolicy
from modelhostd.ports import RemoteFile, SourceFacts

_MIRRORS_FAULTS = frozenset(
    {Reason.BAD_SOURCE_REPLY, Reason.SOURCE_NOT_FOUND, Reason.AUTHENTICATION_REQUIRED}
)
"""What a mirror may say where the Hub itself might say something else."""


class HubEndpoints:
    """Endpoints of the Hub, the best first; satisfies ``source.SourceAdapter``."""

    def __init__(self, hubs: Sequence[Hub]) -> None:
        self._hubs = tuple(hubs)
        endpoints = (hub.config.endpoint for hub in self._hubs)
        self._policy = self._hubs[0].config.policy.with_endpoints(*endpoints)
        self._lock = threading.Lock()
        self._at: dict[str, int] = {}
        """By source: the endpoint that answered last."""

    @property
    def retry(self) -> RetryPolicy:
        """How often and how long the endpoints are tried again."""
        return self._hubs[0].retry

    @property
    def files_at_once(self) -> int:
        """Files of one download that are fetched side by side."""
        return self._hubs[0].files_at_once

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Return the connections of one transfer, to any of the endpoints."""
        return Connections(self._policy, self._hubs[0].config.limits, canceller, source.uri)

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        """Ask the endpoints in turn; a refusal of the first is believed, one of a mirror is not.

        Raises what the first endpoint said when none helps.
        """
        failure: Transient | None = None
        for number, hub in enumerate(self._hubs):
            try:
                facts = hub.plan(connections, source, allow_unsafe=allow_unsafe)
            except Transient as error:
                failure = failure or error
            except ModelhostError as error:
                if number == 0 or error.reason not in _MIRRORS_FAULTS:
                    raise
            else:
                self._found(source, number)
                return facts
        assert failure is not None
        raise failure

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> Reader:
        """Return the reader of one file, which begins with the endpoint that made the plan."""
        readers = [hub.reader(connections, source, revision, file) for hub in self._hubs]
        with self._lock:
            return _Reader(readers, self._at.get(source.uri, 0))

    def _found(self, source: Source, number: int) -> None:
        with self._lock:
            self._at.pop(source.uri, None)
            if number:
                while len(self._at) >= 1000:
                    self._at.pop(next(iter(self._at)))
                self._at[source.uri] = number


class _Reader:
    """One file at several endpoints: each failure moves on to the next."""

    def __init__(self, readers: Sequence[Reader], at: int) -> None:
        self._readers = readers
        self._at = at
        self._lock = threading.Lock()

    def open(self, start: int, end: int) -> Body:
        """Ask the endpoint whose turn it is; see ``source.Reader``."""
        at = self._at
        try:
            return self._readers[at].open(start, end)
        except Transient:
            self._move_on(at)
            raise
        except ModelhostError as error:
            if at == 0 or error.reason not in _MIRRORS_FAULTS:
                raise
            self._move_on(at)
            raise Transient(error, 0.0) from error

    def _move_on(self, at: int) -> None:
        # Of several ranges that fail together only the first moves on.
        with self._lock:
            if self._at == at:
                self._at = (at + 1) % len(self._readers)
