"""EventService: the committed changes of the host as streams and pages.

A watcher is a number, the sequence it reads next, on the journal that all share: there is no queue for any
of them. What it costs while it does not read is one message of at most 32 KiB and gRPC's window.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from math import inf

from modelhost.v1 import event_service_pb2, events_pb2, host_pb2
from modelhostd.api import addressing, convert, convert_from, convert_values
from modelhostd.api.calls import Call
from modelhostd.api.errors import shutting_down
from modelhostd.api.event_batches import Batch, Batches, EventFigures, snapshot_messages
from modelhostd.api.event_wakeups import Wakeups
from modelhostd.api.methods import Service
from modelhostd.api.statistics import MODELS_MAX, Statistics
from modelhostd.core import pages
from modelhostd.core.errors import invalid
from modelhostd.core.event_filter import EventFilter, make_filter
from modelhostd.core.resources import Kind, Operation, Resource
from modelhostd.host import Host
from modelhostd.host.journal import Journal

WATCHERS_MAX = 1024
BOOKMARK_S = 10.0
BOOKMARK_JITTER = 0.1
SAMPLE_S = 0.25
INTERVAL_S, INTERVAL_MIN_S, INTERVAL_MAX_S = 1.0, 0.25, 60.0
PAGE_SCAN_MAX = 10_000
"""Events that one page looks at, so that a filter which lets nothing pass does not read all of history."""
PAGE_BYTES_MAX = 1024 * 1024

_KINDS = {convert.RESOURCE_KINDS[kind]: kind for kind in Kind}
_GOLDEN = 0.618_033_988_75


def event_service(host: Host, statistics: Statistics) -> Service:
    """Return the service to offer."""
    descriptor = event_service_pb2.DESCRIPTOR.services_by_name["EventService"]
    return Service(descriptor, EventService(host, statistics))


class EventService:
    """Watches and lists events. ``figures`` is what it has done so far, for metrics."""

    def __init__(
        self,
        host: Host,
        statistics: Statistics,
        *,
        watchers_max: int = WATCHERS_MAX,
        bookmark_s: float = BOOKMARK_S,
    ) -> None:
        self._host = host
        self._statistics = statistics
        self._bookmark_s = bookmark_s
        self.figures = EventFigures()
        self._batches = Batches(self.figures)
        self._wakeups = Wakeups(watchers_max)
        self._samples: dict[tuple[EventFilter, int], tuple[int, bytes]] = {}

    @property
    def _journal(self) -> Journal:
        # Asked for each time: the registry makes it when it opens.
        return self._host.registry.journal

    # --- watching -------------------------------------------------------------------------------

    @property
    def watcher_count(self) -> int:
        """How many streams of events are open now."""
        return len(self._wakeups)

    async def watch_events(
        self, request: event_service_pb2.WatchEventsRequest, call: Call
    ) -> AsyncIterator[bytes]:
        """See EventService.WatchEvents in the contract; yields encoded messages."""
        journal = self._journal
        wanted = _filter(request.filter)
        cursor = _start(request, journal)
        self.figures.watches += 1
        loop = asyncio.get_running_loop()
        every = self._bookmark_s * _jitter(self.figures.watches)
        # From sample 0 on: whoever comes late is told at once how far everything is.
        seen, sample_due = 0, loop.time()
        with self._wakeups.watching(journal.changed, call.draining) as watcher:
            # No await before the state is taken: it is the one of `cursor - 1`.
            for message in self._snapshot(wanted) if request.include_snapshot else ():
                yield message
            yield self._bookmark(cursor - 1)
            bookmark_due = loop.time() + every
            while True:
                watcher.wake.clear()
                # What is published from here on comes with the next round, batched for all.
                last = journal.last_sequence
                while cursor <= last and not call.draining.is_set():
                    batch = await self._batches.read(journal, wanted, cursor)
                    cursor = batch.next_sequence
                    if batch.count:
                        yield self._sent(batch)
                        bookmark_due = loop.time() + every
                if call.draining.is_set():
                    yield self._bookmark(cursor - 1)
                    raise shutting_down(cursor)
                now = loop.time()
                # A sample never comes before the event that tells of its operation.
                current = cursor > journal.last_sequence
                if request.include_progress and current and now >= sample_due:
                    seen, data = self._progress(wanted, seen)
                    sample_due = now + SAMPLE_S
                    if data:
                        yield data
                        bookmark_due = loop.time() + every
                if now >= bookmark_due:
                    yield self._bookmark(cursor - 1)
                    bookmark_due = loop.time() + every
                watcher.due = min(bookmark_due, sample_due if request.include_progress else inf)
                await watcher.wake.wait()

    def _sent(self, batch: Batch) -> bytes:
        self.figures.batches_sent += 1
        self.figures.events_sent += batch.count
        return batch.data

    def _snapshot(self, wanted: EventFilter) -> Iterator[bytes]:
        """Return the state as it is now, in messages that are encoded as they are asked for."""
        state = self._host.registry.committed
        resources: list[Resource] = [
            resource
            for kind in Kind
            for key, resource in state.table(kind).items()
            if wanted.passes_resource(kind, key, resource)
        ]
        return snapshot_messages(resources)

    def _bookmark(self, sequence: int) -> bytes:
        bookmark = events_pb2.Bookmark(
            sequence=sequence,
            store_id=self._host.registry.store_id,
            time=convert_values.timestamp(self._host.clock.time()),
        )
        return event_service_pb2.WatchEventsResponse(bookmark=bookmark).SerializeToString()

    def _progress(self, wanted: EventFilter, seen: int) -> tuple[int, bytes]:
        """Return the number of the newest sample, and what is newer than ``seen`` as a message."""
        made = self._samples.get((wanted, seen))
        number, newer = self._host.operations.samples_after(seen)
        if made is not None and made[0] == number:
            return made
        # What is not committed has no event yet, and may never have one.
        known = self._host.registry.committed.operations
        message = event_service_pb2.WatchEventsResponse()
        for key, progress in newer.items():
            operation: Operation | None = known.get(key)
            if operation is not None and wanted.passes_resource(Kind.OPERATION, key, operation):
                message.progress_samples.add(
                    operation=convert_values.named("operations", key),
                    model=convert_values.named("models", operation.model),
                    progress=convert.progress(progress),
                )
        if made is None and len(self._samples) >= 64:
            self._samples.clear()
        self._samples[wanted, seen] = number, message.SerializeToString()
        return self._samples[wanted, seen]

    # --- figures --------------------------------------------------------------------------------

    async def watch_statistics(
        self, request: event_service_pb2.WatchStatisticsRequest, call: Call
    ) -> AsyncIterator[host_pb2.Statistics]:
        """See EventService.WatchStatistics in the contract."""
        interval = _interval(request)
        convert_from.few("models", request.models, MODELS_MAX)
        models = [
            addressing.model_id(self._host.registry.committed, f"models[{i}]", name)
            for i, name in enumerate(request.models)
        ]
        before = None
        while not call.draining.is_set():
            figures = self._statistics.take(models)
            compared = host_pb2.Statistics()
            compared.CopyFrom(figures)
            # They differ each time and say nothing by themselves.
            compared.ClearField("time")
            compared.ClearField("uptime")
            if compared != before:
                before = compared
                yield figures
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await call.draining.wait()
        raise shutting_down()

    # --- listing --------------------------------------------------------------------------------

    async def list_events(self, request: event_service_pb2.ListEventsRequest, call: Call) -> bytes:
        """See EventService.ListEvents in the contract; returns the encoded answer."""
        journal = self._journal
        size = pages.page_size(request.page_size)
        wanted = _filter(request.filter)
        cursor, query = _position(request, journal)
        last = min(request.end_sequence or journal.last_sequence, journal.last_sequence)
        found: list[bytes] = []
        size_bytes = 0
        stop = min(last, cursor + PAGE_SCAN_MAX - 1)
        while cursor <= stop and len(found) < size and size_bytes < PAGE_BYTES_MAX:
            for event in await journal.read(cursor):
                if event.sequence > stop or len(found) >= size or size_bytes >= PAGE_BYTES_MAX:
                    break
                cursor = event.sequence + 1
                if wanted.everything or wanted.passes(event):
                    found.append(self._batches.encoded(event))
                    size_bytes += len(found[-1])
        rest = event_service_pb2.ListEventsResponse(
            next_page_token=pages.encode(str(cursor), query) if cursor <= last else "",
            sequence=journal.last_sequence,
            store_id=self._host.registry.store_id,
            first_sequence=journal.first_sequence,
        )
        return b"".join((*found, rest.SerializeToString()))


def _filter(given: events_pb2.EventFilter) -> EventFilter:
    convert_from.few("filter.kinds", given.kinds)
    kinds: list[Kind] = []
    for i, value in enumerate(given.kinds):
        if value not in _KINDS:
            raise invalid(f"filter.kinds[{i}]", "a kind of Resource.Kind", value)
        kinds.append(_KINDS[value])
    return make_filter(kinds, given.names, given.models, given.reasons)


def _start(request: event_service_pb2.WatchEventsRequest, journal: Journal) -> int:
    """Return the first sequence to send, or raise INVALID_ARGUMENT or OUT_OF_RANGE."""
    start = request.start_sequence
    if start < 0:
        raise invalid("start_sequence", "0 (from now on) or a sequence", start)
    if request.include_snapshot and start:
        raise invalid("start_sequence", "0 together with include_snapshot", start)
    if not start:
        return journal.last_sequence + 1
    journal.check(start)
    return start


def _interval(request: event_service_pb2.WatchStatisticsRequest) -> float:
    if not request.HasField("interval"):
        return INTERVAL_S
    seconds = request.interval.ToNanoseconds() / 1e9
    if not INTERVAL_MIN_S <= seconds <= INTERVAL_MAX_S:
        raise invalid("interval", f"{INTERVAL_MIN_S:g} s to {INTERVAL_MAX_S:g} s", f"{seconds:g} s")
    return seconds


def _position(request: event_service_pb2.ListEventsRequest, journal: Journal) -> tuple[int, str]:
    """Return the sequence at which a page begins, and the query that its tokens are bound to."""
    for field in ("start_sequence", "end_sequence"):
        if getattr(request, field) < 0:
            raise invalid(field, "0 or a sequence", getattr(request, field))
    key = request.filter.SerializeToString(deterministic=True).hex()
    query = f"ListEvents {request.start_sequence} {request.end_sequence} {key}"
    position = pages.decode(request.page_token, query)
    if not position:
        return request.start_sequence or journal.first_sequence, query
    if not position.isdecimal():
        raise invalid("page_token", "the next_page_token of the same query", request.page_token)
    return int(position), query


def _jitter(number: int) -> float:
    """Return a factor about 1 that differs between watchers, so that they are not woken in step."""
    return 1 - BOOKMARK_JITTER + 2 * BOOKMARK_JITTER * (number * _GOLDEN % 1)
