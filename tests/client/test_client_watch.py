"""A watch goes on over whatever breaks, and says so where it cannot."""

import asyncio
import threading
from collections.abc import Iterator

import grpc
import pytest

from modelhost import (
    AsyncClient,
    Client,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Reset,
    Unavailable,
    Unreachable,
)
from modelhost._watch import LONGEST_DELAY_S, WatchState
from modelhost.v1 import event_service_pb2, events_pb2
from tests.client.double import Double, failure, hold
from tests.support import DEADLINE_S

Answer = event_service_pb2.WatchEventsResponse
COMPACTED = OutOfRange("gone", reason="SEQUENCE_COMPACTED")
AWAY = Unavailable("away")


def events(*sequences: int) -> Answer:
    return Answer(events=[events_pb2.Event(sequence=s, name="models/a") for s in sequences])


def bookmark(sequence: int, store: str = "s") -> Answer:
    return Answer(bookmark=events_pb2.Bookmark(sequence=sequence, store_id=store))


def snapshot(*models: str) -> Answer:
    answer = Answer()
    for model in models:
        answer.snapshot.resources.add().model.name = f"models/{model}"
    return answer


def told(items) -> list[object]:
    """Return items in short: sequences of events, names of resources, the rest as words."""
    words: list[object] = []
    for item in items:
        if isinstance(item, events_pb2.Event):
            words.append(item.sequence)
        elif isinstance(item, events_pb2.Resource):
            words.append(item.model.name)
        elif isinstance(item, events_pb2.Bookmark):
            words.append(f"up to {item.sequence}")
        elif isinstance(item, Reset):
            words.append(f"{item.reason} after {item.sequence}")
        else:
            words.append(item.operation)
    return words


# --- the state machine --------------------------------------------------------------------------------


def state(**arguments) -> WatchState:
    return WatchState(**{"sequence": None, "jitter": lambda: 0.5} | arguments)


def feed(watch: WatchState, *messages: Answer) -> list[object]:
    return [word for message in messages for word in told(watch.receive(message)[0])]


def asked(watch: WatchState) -> tuple[int, bool]:
    request = watch.request()
    return request.start_sequence, request.include_snapshot


def test_the_whole_state_comes_first_and_then_each_event_once() -> None:
    """A snapshot ends with its bookmark; events behind it are handed out once, in order."""
    watch = state()
    assert asked(watch) == (0, True)
    assert feed(
        watch, snapshot("a", "b"), snapshot("c"), bookmark(7), events(8, 9), events(9, 10)
    ) == [*("models/a", "models/b", "models/c", "up to 7", 8, 9, 10)]
    assert watch.broken(AWAY)[0] == []
    assert asked(watch) == (11, False)


def test_a_watch_resumes_from_its_last_bookmark_too() -> None:
    """A bookmark moves the place to go on from, though no event passed the filter; it is told once."""
    watch = state(sequence=3)
    assert asked(watch) == (4, False)
    assert feed(watch, bookmark(3), events(5), bookmark(20), bookmark(30)) == ["up to 3", 5]
    watch.broken(None)
    assert asked(watch) == (31, False)
    assert feed(watch, bookmark(30)) == []


def test_from_now_on_without_a_snapshot() -> None:
    """Without a snapshot and without a sequence the first bookmark says where now is."""
    watch = state(snapshot=False)
    assert asked(watch) == (0, False)
    assert feed(watch, bookmark(5)) == ["up to 5"]
    watch.broken(AWAY)
    assert asked(watch) == (6, False)


@pytest.mark.parametrize("wanted", [True, False], ids=["snapshot", "none"])
@pytest.mark.parametrize("reason", ["SEQUENCE_COMPACTED", "SEQUENCE_IN_FUTURE"])
def test_history_that_is_gone_is_a_reset(reason, wanted) -> None:
    """The same start is never asked for again: the state comes anew, where it is wanted."""
    watch = state(sequence=3, snapshot=wanted)
    items, delay = watch.broken(OutOfRange("gone", reason=reason))
    assert told(items) == [f"{reason} after 3"]
    assert delay == 0
    assert asked(watch) == (0, wanted)
    assert feed(watch, bookmark(50, "other"), events(51)) == ["up to 50", 51]


def test_another_history_is_a_reset() -> None:
    """A store_id that is not the one before voids the sequence, before any of its events is told."""
    watch = state()
    feed(watch, snapshot("a"), bookmark(7, "old"))
    watch.broken(AWAY)
    items, goes_on = watch.receive(bookmark(7, "new"))
    assert told(items) == ["STORE_CHANGED after 7"]
    assert not goes_on
    assert asked(watch) == (0, True)
    assert feed(watch, snapshot("b"), bookmark(2, "new"), events(3)) == ["models/b", "up to 2", 3]
    assert (watch.sequence, watch.store_id) == (3, "new")


def test_a_kept_sequence_is_compared_with_its_store() -> None:
    """A sequence of another process is only good in the history that it belongs to."""
    watch = state(sequence=9, store_id="old")
    assert told(watch.receive(bookmark(9, "new"))[0]) == ["STORE_CHANGED after 9"]


def test_half_a_snapshot_is_void() -> None:
    """A connection that breaks inside a snapshot: forget the half, the whole comes again."""
    watch = state()
    feed(watch, snapshot("a"))
    assert told(watch.broken(AWAY)[0]) == ["SNAPSHOT_BROKEN after 0"]
    assert asked(watch) == (0, True)
    assert told(watch.broken(AWAY)[0]) == []


@pytest.mark.parametrize("error", [AWAY, NotFound("no")], ids=["away", "refused"])
def test_the_first_connection_is_not_repeated(error) -> None:
    """A daemon that was never reached, or that refuses, is told to the caller."""
    with pytest.raises(type(error)):
        state().broken(error)


def test_a_refusal_ends_a_watch_that_had_begun() -> None:
    """What no waiting mends is raised, whenever it comes."""
    watch = state()
    feed(watch, bookmark(1))
    with pytest.raises(NotFound):
        watch.broken(NotFound("no"))


def test_tries_come_slower_up_to_a_bound() -> None:
    """Waits double up to a bound, begin anew after a message, and obey what the daemon asks for."""
    watch = state(snapshot=False)
    feed(watch, bookmark(1))
    delays = [watch.broken(AWAY)[1] for _ in range(12)]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == LONGEST_DELAY_S
    feed(watch, bookmark(1))
    assert watch.broken(AWAY)[1] == 0.1
    asked_for = Unavailable("later", retry_delay=1.5)
    assert watch.broken(asked_for)[1] == 1.5


def test_a_negative_sequence_is_refused() -> None:
    """Sequences begin at 1; 0 means from the first on."""
    with pytest.raises(InvalidArgument):
        state(sequence=-1)
    assert asked(state(sequence=0)) == (1, False)


# --- on the wire --------------------------------------------------------------------------------------


def script(*parts: Answer | Exception | object):
    """Return an answer that sends ``parts``, and runs those that are callable."""

    def answer(request, context) -> Iterator[Answer]:
        for part in parts:
            if callable(part):
                part(request, context)
            else:
                yield part

    return answer


def take(watch, count: int) -> list[object]:
    return told([next(watch) for _ in range(count)])


def test_a_watch_survives_a_restart_on_the_same_socket(double: Double, client: Client) -> None:
    """The daemon stops and comes back: the watch goes on after its last sequence, with nothing twice."""
    double.on(
        "WatchEvents",
        script(snapshot("a"), bookmark(1), events(2, 3), hold),
        script(bookmark(3), events(4), hold),
    )
    broken: list[object] = []
    with client.watch(reconnecting=lambda error, delay: broken.append(error)) as watch:
        assert take(watch, 4) == ["models/a", "up to 1", 2, 3]
        double.stop()
        double.start()
        assert take(watch, 1) == [4]
    assert [r.start_sequence for r in double.requests("WatchEvents")] == [0, 4]
    assert broken
    assert all(isinstance(error, Unavailable) for error in broken)
    assert (watch.sequence, watch.store_id) == (4, "s")


def test_an_async_watch_survives_a_restart(double: Double) -> None:
    """The asynchronous twin does the same."""
    double.on(
        "WatchEvents",
        script(bookmark(1), events(2), hold),
        script(bookmark(2), events(3), hold),
    )

    async def run() -> list[object]:
        async with AsyncClient(double.target, retries=False) as client:
            watch = client.watch(snapshot=False)
            items = [await anext(watch), await anext(watch)]
            await asyncio.to_thread(double.stop)
            await asyncio.to_thread(double.start)
            items.append(await anext(watch))
        return told(items)

    assert asyncio.run(run()) == ["up to 1", 2, 3]


def test_a_watch_goes_on_after_an_end_in_order(double: Double, client: Client) -> None:
    """A daemon that closes the stream with OK is asked again from where it ended."""
    double.on("WatchEvents", script(bookmark(1), events(2)), script(bookmark(2), events(3), hold))
    with client.watch(snapshot=False) as watch:
        assert take(watch, 3) == ["up to 1", 2, 3]
    assert [r.start_sequence for r in double.requests("WatchEvents")] == [0, 3]


def test_compacted_history_is_a_marker_and_a_new_snapshot(double: Double, client: Client) -> None:
    """A subscriber that was away too long is told so, and gets the whole state."""
    double.on(
        "WatchEvents",
        failure(grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_COMPACTED"),
        script(snapshot("a"), bookmark(90), hold),
    )
    with client.watch(since=4) as watch:
        assert take(watch, 3) == ["SEQUENCE_COMPACTED after 4", "models/a", "up to 90"]


def test_a_new_database_is_a_marker_and_a_new_snapshot(double: Double, client: Client) -> None:
    """Behind another store_id the stream is opened anew, with a snapshot."""
    double.on(
        "WatchEvents",
        script(bookmark(4, "new"), events(5), hold),
        script(snapshot("b"), bookmark(2, "new"), hold),
    )
    with client.watch(since=4, store_id="old") as watch:
        assert take(watch, 3) == ["STORE_CHANGED after 4", "models/b", "up to 2"]


def test_a_daemon_that_was_never_there_is_unreachable(tmp_path) -> None:
    """The first connection fails at once, so that a typo in the target is seen."""
    with Client(f"unix:{tmp_path}/none.sock", retries=False) as client, pytest.raises(Unreachable):
        next(client.watch())


def test_a_watch_asks_for_what_it_was_told(double: Double, both) -> None:
    """Filters and progress reach the daemon in the contract's words; a model's id becomes its name."""
    double.on("WatchEvents", script(bookmark(1), hold))

    def call(client):
        watch = client.watch(
            snapshot=False, kinds=["model"], names=["slots/s"], models=["a"], reasons=["EVICTED"],
            progress=True,
        )  # fmt: skip
        return next(watch) if isinstance(client, Client) else anext(watch)

    both(call)
    (request,) = double.requests("WatchEvents")
    assert request == event_service_pb2.WatchEventsRequest(
        filter=events_pb2.EventFilter(
            kinds=["MODEL"], names=["slots/s"], models=["models/a"], reasons=["EVICTED"]
        ),
        include_progress=True,
    )


def test_progress_samples_are_handed_out(double: Double, client: Client) -> None:
    """Samples come between the events and do not move the sequence."""
    sample = Answer(progress_samples=[events_pb2.ProgressSample(operation="operations/1")])
    double.on("WatchEvents", script(bookmark(1), sample, hold))
    with client.watch(progress=True, snapshot=False) as watch:
        assert take(watch, 2) == ["up to 1", "operations/1"]
        assert watch.sequence == 1


def test_an_unknown_kind_is_refused_before_any_call(double: Double, client: Client) -> None:
    """A filter that means nothing is InvalidArgument that lists the kinds."""
    with pytest.raises(InvalidArgument, match="INSTANCE"):
        client.watch(kinds=["thing"])
    assert double.calls == []


def test_closing_from_another_thread_ends_the_iteration(double: Double, client: Client) -> None:
    """A watch that waits for the next event ends when it is closed, without an error."""
    double.on("WatchEvents", script(bookmark(1), hold))
    watch = client.watch(snapshot=False)
    assert take(watch, 1) == ["up to 1"]
    closer = threading.Thread(target=watch.close)
    closer.start()
    assert told(watch) == []
    closer.join()


def test_closing_the_client_ends_a_watch_that_waits_to_connect(double: Double) -> None:
    """A watch between two tries does not outlive its client."""
    double.on("WatchEvents", script(bookmark(1), hold))
    client = Client(double.target, retries=False)
    waits = threading.Event()
    watch = client.watch(snapshot=False, reconnecting=lambda error, delay: waits.set())
    assert take(watch, 1) == ["up to 1"]
    double.stop()
    closer = threading.Thread(target=lambda: waits.wait(DEADLINE_S) and client.close())
    closer.start()
    assert told(watch) == []
    closer.join()


async def test_a_wait_that_is_given_up_loses_nothing(double: Double) -> None:
    """After a timeout around one step the next step goes on where the watch was."""
    open_gate = threading.Event()
    double.on(
        "WatchEvents",
        script(bookmark(1), events(2), lambda r, c: open_gate.set(), hold),
        script(bookmark(2), events(3), hold),
    )
    async with AsyncClient(double.target, retries=False) as client:
        watch = client.watch(snapshot=False)
        assert told([await anext(watch), await anext(watch)]) == ["up to 1", 2]
        await asyncio.to_thread(open_gate.wait, DEADLINE_S)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(watch), 0.01)
        assert told([await anext(watch)]) == [3]
        await watch.close()
    assert [r.start_sequence for r in double.requests("WatchEvents")] == [0, 3]


# --- what happened ------------------------------------------------------------------------------------


def page(*sequences: int, token: str = "") -> event_service_pb2.ListEventsResponse:
    return event_service_pb2.ListEventsResponse(
        events=[events_pb2.Event(sequence=s) for s in sequences], next_page_token=token
    )


def test_past_events_come_from_all_pages(double: Double, both) -> None:
    """Pages are asked for until the last, an empty one in between included."""
    double.on("ListEvents", page(5, 6, token="x"), page(token="y"), page(7))
    found = both(lambda c: c.events(4, models=["a"]))
    assert [event.sequence for event in found] == [5, 6, 7]
    assert [r.page_token for r in double.requests("ListEvents")] == ["", "x", "y"]
    assert {r.start_sequence for r in double.requests("ListEvents")} == {5}


def test_past_events_stop_at_the_limit(double: Double, both) -> None:
    """No more than asked for, and no page more than needed."""
    double.on("ListEvents", page(1, 2, token="x"), page(3, 4, token="y"))
    assert [event.sequence for event in both(lambda c: c.events(limit=3))] == [1, 2, 3]
    assert len(double.requests("ListEvents")) == 2
