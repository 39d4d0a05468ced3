"""One operation as a stream: its state now, each change, samples of its progress, and an end."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import FINAL_STATES, Kind, Operation
from modelhostd.host.journal import Journal
from modelhostd.host.samples import Samples

SAMPLE_INTERVAL_S = 0.25


def watch_operation(
    journal: Journal,
    samples: Samples,
    find: Callable[[str], Operation | None],
    live: Callable[[Operation], Operation],
    operation: Operation,
) -> AsyncGenerator[Operation, None]:
    """Yield ``operation`` as it is now, each change, at most 4 samples a second; end after the end.

    A reader so slow that history overtakes it is given the state as it is then; an operation that is
    forgotten meanwhile ends the stream.
    """
    # Taken now, not when the stream is first asked: nothing between the two may be missed.
    return _watch(journal, samples, find, live, operation, journal.last_sequence + 1)


async def _watch(
    journal: Journal,
    samples: Samples,
    find: Callable[[str], Operation | None],
    live: Callable[[Operation], Operation],
    operation: Operation,
    cursor: int,
) -> AsyncGenerator[Operation, None]:
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    with journal.changed.subscribed(changed), samples.changed.subscribed(changed):
        seen, sampled_at = samples.count, loop.time()
        yield operation
        while operation.state not in FINAL_STATES:
            changed.clear()
            while cursor <= journal.last_sequence:
                states, cursor = await _read(journal, find, operation.id, cursor)
                for state in states:
                    if state is None:
                        return
                    operation = live(state)
                    yield operation
            if operation.state in FINAL_STATES:
                return
            pause = max(0.0, sampled_at + SAMPLE_INTERVAL_S - loop.time())
            fresh = samples.number(operation.id) > seen
            if fresh and pause == 0.0:
                seen, sampled_at = samples.count, loop.time()
                operation = live(operation)
                yield operation
                continue
            try:
                async with asyncio.timeout(pause if fresh else None):
                    await changed.wait()
            except TimeoutError:
                pass


async def _read(
    journal: Journal, find: Callable[[str], Operation | None], key: str, cursor: int
) -> tuple[list[Operation | None], int]:
    """Return the next states of an operation (None = forgotten), and where to read on."""
    try:
        events = await journal.read(cursor)
    except ModelhostError as error:
        if error.reason is not Reason.SEQUENCE_COMPACTED:
            raise
        return [find(key)], journal.last_sequence + 1
    states = [
        event.resource if isinstance(event.resource, Operation) else None
        for event in events
        if event.kind is Kind.OPERATION and event.key == key
    ]
    return states, events[-1].sequence + 1
