"""Events: watch what happens, and look at what happened."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Self

from modelhost._async.transport import AsyncStream, AsyncTransport
from modelhost._errors import ModelhostError
from modelhost._watch import WatchItem, WatchState, make_filter
from modelhost.v1 import event_service_pb2, events_pb2

PAGE_SIZE = 1000

Reconnecting = Callable[[ModelhostError | None, float], None]


class AsyncWatch:
    """A watch of events that goes on by itself; iterate over it, ``close`` it when done.

    It survives a lost connection and a restart of the daemon, and misses nothing: it asks for what
    follows the last sequence it saw. Where that is no longer to be had it yields ``Reset``.
    """

    def __init__(
        self, transport: AsyncTransport, state: WatchState, reconnecting: Reconnecting | None
    ) -> None:
        self._transport = transport
        self._state = state
        self._reconnecting = reconnecting
        self._stream: AsyncStream[event_service_pb2.WatchEventsResponse] | None = None
        self._items: deque[WatchItem] = deque()
        self._delay = 0.0
        self._closed = False

    @property
    def sequence(self) -> int | None:
        """The last sequence seen, to go on from later as ``since``; None before the first bookmark."""
        return self._state.sequence

    @property
    def store_id(self) -> str:
        """The history that ``sequence`` belongs to; empty before the first bookmark."""
        return self._state.store_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchItem:
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            await self._step()
        return self._items.popleft()

    async def close(self) -> None:
        """End the watch; what is still to be handed out is handed out."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()

    @property
    def _ended(self) -> bool:
        return self._closed or self._transport.closed

    async def _step(self) -> None:
        """Wait for one message, or for the moment to open the next stream."""
        if self._delay > 0:
            delay, self._delay = self._delay, 0.0
            await self._transport.pause(delay)
            return
        stream = self._stream
        if stream is None:
            stream = self._stream = self._transport.stream(
                self._transport.events.WatchEvents, self._state.request()
            )
        message: event_service_pb2.WatchEventsResponse | None = None
        error: ModelhostError | None = None
        complete = False
        try:
            message = await stream.read()
            complete = True
        except ModelhostError as failure:
            error = failure
            complete = True
        finally:
            if not complete:  # Interrupted: the stream is not worth keeping, the place in it is.
                stream.cancel()
                self._stream = None
        if message is not None:
            items, goes_on = self._state.receive(message)
            self._items.extend(items)
            if not goes_on:
                stream.cancel()
                self._stream = None
        elif not self._ended:
            self._stream = None
            items, self._delay = self._state.broken(error)
            self._items.extend(items)
            if self._reconnecting is not None:
                self._reconnecting(error, self._delay)


class AsyncEvents:
    """What ``AsyncClient`` does with events."""

    _transport: AsyncTransport

    def watch(
        self,
        since: int | None = None,
        *,
        store_id: str = "",
        snapshot: bool = True,
        kinds: Iterable[str] = (),
        names: Iterable[str] = (),
        models: Iterable[str] = (),
        reasons: Iterable[str] = (),
        progress: bool = False,
        reconnecting: Reconnecting | None = None,
    ) -> AsyncWatch:
        """Watch what happens on the host.

        ``since`` is the last sequence that was seen, in the history ``store_id`` (empty = do not
        compare); the events after it follow. Without it the whole state comes first, or, with
        ``snapshot`` False, only what happens from now on. Yields messages of the contract and ``Reset``:

        - ``Resource``: one thing of the state, while the snapshot comes;
        - ``Bookmark``: the snapshot is complete, or the watch has begun: all up to its sequence is known;
        - ``Event``: a change, with the resource after it; in order, each once;
        - ``ProgressSample``: how far an operation is, with ``progress``; not promised;
        - ``Reset``: what came before no longer holds; the state follows anew.

        ``kinds`` (``MODEL``, ``INSTANCE``, ...), ``names`` (resource names and all below), ``models`` and
        ``reasons`` narrow what comes. ``reconnecting`` is called with what broke a connection (None =
        closed in order) and the seconds until the next try. The first connection is not repeated:
        Unreachable is raised.
        """
        state = WatchState(
            sequence=since,
            store_id=store_id,
            snapshot=snapshot,
            filter=make_filter(kinds, names, models, reasons),
            progress=progress,
        )
        return AsyncWatch(self._transport, state, reconnecting)

    async def events(
        self,
        since: int | None = None,
        *,
        limit: int | None = None,
        kinds: Iterable[str] = (),
        names: Iterable[str] = (),
        models: Iterable[str] = (),
        reasons: Iterable[str] = (),
    ) -> AsyncIterator[events_pb2.Event]:
        """Yield past events in order: those after ``since``, None = all that are kept.

        ``limit`` bounds how many. Raises OutOfRange where the events after ``since`` are no longer kept.
        """
        request = event_service_pb2.ListEventsRequest(
            start_sequence=0 if since is None else since + 1,
            filter=make_filter(kinds, names, models, reasons),
            page_size=PAGE_SIZE if limit is None else max(1, min(limit, PAGE_SIZE)),
        )
        left = limit
        while left is None or left > 0:
            page = await self._transport.unary(self._transport.events.ListEvents, request)
            for event in page.events[:left]:
                yield event
            left = None if left is None else left - len(page.events)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
