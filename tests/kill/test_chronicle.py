"""The chronicle of the kill loop finds what it is there to find, in a history of three changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from modelhost.v1 import event_service_pb2, events_pb2, models_pb2
from tests.event_validators import Event, Resource, Response, ViolationError, applied
from tests.kill.chronicle import Chronicle
from tests.kill.recording import Ack, Connection, Recorded, Watcher

ONE = events_pb2.EventFilter(models=["models/m1"])
WATCHERS = (Watcher("all"), Watcher("one", ONE), Watcher("state", snapshot=True))


def model(name: str, mark: str) -> Resource:
    return Resource(model=models_pb2.Model(name=f"models/{name}", display_name=mark))


def event(sequence: int, change: "Event.Change.ValueType", name: str, mark: str) -> Event:
    return Event(
        sequence=sequence,
        kind=Resource.MODEL,
        name=f"models/{name}",
        change=change,
        resource=model(name, mark),
    )


def bookmark(sequence: int) -> Response:
    return Response(bookmark=events_pb2.Bookmark(sequence=sequence, store_id="s"))


def told(*events: Event) -> Response:
    return Response(events=events)


def held(*resources: Resource) -> Response:
    return Response(snapshot=event_service_pb2.Snapshot(resources=resources))


E1 = event(1, Event.CREATED, "m1", "a")
E2 = event(2, Event.CREATED, "m2", "b")
E3 = event(3, Event.UPDATED, "m1", "c")


@dataclass
class Home:
    """What one look at a home finds."""

    events: Sequence[Event] = (E1, E2, E3)
    acks: Sequence[Ack] = (
        Ack("models/m1", {"display_name": "c"}),
        Ack("requests/r", {"answer": "o"}),
    )
    all: Sequence[Response] = (bookmark(0), told(E1, E2), told(E3))
    one: Sequence[Response] = (bookmark(0), told(E1), told(E3))
    state: Sequence[Response] = (held(model("m1", "a")), bookmark(1), told(E2), told(E3))
    start: int = 1
    requests: dict[str, str] = field(default_factory=lambda: {"r": "o"})
    store: str = "s"
    rows: dict[str, Resource] | None = None


def look(*homes: Home) -> None:
    """Have a chronicle take what was found, look after look, and then all of it."""
    chronicle = Chronicle(WATCHERS)
    state: dict[str, Resource] = {}
    for home in homes:
        state = applied(state, home.events)
        streams = {"all": home.all, "one": home.one, "state": home.state}
        connections = [Connection(n, home.start, list(m)) for n, m in streams.items() if m]
        recorded = Recorded(list(home.acks), connections)
        rows = state if home.rows is None else home.rows
        chronicle.take(home.store, home.events, rows, recorded, home.requests)
    chronicle.check_all()


E4 = event(4, Event.UPDATED, "m2", "d")
NOTHING: Sequence[Response] = ()
WRONG: dict[str, Callable[[], None]] = {
    "a change that was acknowledged is lost": lambda: look(
        Home(acks=[Ack("models/m2", {"display_name": "x"})])
    ),
    "an operation that was acknowledged is lost": lambda: look(Home(acks=[Ack("operations/o")])),
    "an answered request is forgotten": lambda: look(Home(requests={})),
    "a request has another answer": lambda: look(Home(requests={"r": "other"})),
    "the log has a gap": lambda: look(Home(events=(E1, E3))),
    "the log begins late": lambda: look(Home(events=(E2, E3))),
    "rows without events": lambda: look(
        Home(rows={"models/m1": model("m1", "c"), "models/m2": model("m2", "?")})
    ),
    "a row is gone": lambda: look(Home(rows={"models/m1": model("m1", "c")})),
    "told before it was on disk": lambda: look(Home(all=(bookmark(0), told(E1, E2, E3, E4)))),
    "a gap in a stream": lambda: look(Home(all=(bookmark(0), told(E1), told(E3)))),
    "a stream out of order": lambda: look(Home(all=(bookmark(0), told(E1, E3, E2)))),
    "an event twice": lambda: look(Home(all=(bookmark(0), told(E1, E2), told(E2, E3)))),
    "an event told in another way": lambda: look(
        Home(all=(bookmark(0), told(E1, E2, event(3, Event.UPDATED, "m1", "?"))))
    ),
    "a filter lets too little pass": lambda: look(Home(one=(bookmark(0), told(E3)))),
    "a filter lets too much pass": lambda: look(Home(one=(bookmark(0), told(E1, E2, E3)))),
    "a stream opens elsewhere": lambda: look(Home(all=(bookmark(1), told(E2, E3)))),
    "a snapshot lacks something": lambda: look(Home(state=(bookmark(1), told(E2), told(E3)))),
    "a snapshot is ahead of its bookmark": lambda: look(
        Home(state=(held(model("m1", "c")), bookmark(1), told(E2), told(E3)))
    ),
    "a stream goes on with a gap": lambda: look(
        Home(all=(bookmark(0), told(E1, E2))),
        Home(
            events=(E4,), acks=(), start=4, all=(bookmark(3), told(E4)), one=NOTHING, state=NOTHING
        ),
    ),
    "another store after a kill": lambda: look(
        Home(), Home(events=(), acks=(), all=NOTHING, one=NOTHING, state=NOTHING, store="other")
    ),
}


def test_a_true_history_passes() -> None:
    """Nothing is found in a history that is as it was told, over two lives."""
    look(
        Home(),
        Home(
            events=(E4,),
            acks=[Ack("models/m2", {"display_name": "d"})],
            start=4,
            all=(bookmark(3), told(E4)),
            one=(bookmark(3),),
            state=(held(model("m1", "c"), model("m2", "d")), bookmark(4)),
        ),
    )


def test_lives_that_told_nobody_anything_pass() -> None:
    """A daemon may be killed each time before a stream was opened."""
    look(Home(acks=(), all=NOTHING, one=NOTHING, state=NOTHING))


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_broken_promise_is_found(wrong: Callable[[], None]) -> None:
    """Each promise, broken once, is a violation."""
    with pytest.raises(ViolationError):
        wrong()
