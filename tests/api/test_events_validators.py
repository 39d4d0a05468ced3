"""The validators of event streams find what they are there to find."""

from collections.abc import Callable

import pytest

from modelhost.v1 import event_service_pb2, events_pb2, models_pb2
from tests import event_validators as validate

Event = events_pb2.Event
Response = event_service_pb2.WatchEventsResponse


def resource(name: str = "models/a") -> events_pb2.Resource:
    return events_pb2.Resource(model=models_pb2.Model(name=name))


def event(sequence: int, change: int = Event.UPDATED, name: str = "models/a") -> Event:
    carried = None if change == Event.DELETED else resource(name)
    kind = events_pb2.Resource.MODEL
    return Event(
        sequence=sequence, name=name, kind=kind, change=Event.Change.Name(change), resource=carried
    )


def events(*sequences: int) -> Response:
    return Response(events=[event(s) for s in sequences])


def bookmark(sequence: int, store: str = "s") -> Response:
    return Response(bookmark=events_pb2.Bookmark(sequence=sequence, store_id=store))


def snapshot(*names: str) -> Response:
    return Response(snapshot=event_service_pb2.Snapshot(resources=[resource(n) for n in names]))


def stream(*messages: Response) -> validate.Stream:
    return validate.take_apart(messages)


PLANTED: dict[str, Callable[[], object]] = {
    "repeat": lambda: stream(bookmark(0), events(1, 2), events(2, 3)),
    "reorder": lambda: stream(bookmark(0), events(2), events(1)),
    "gap": lambda: validate.check_contiguous([event(1), event(3)], 1, 3),
    "end-missing": lambda: validate.check_contiguous([event(1)], 1, 2),
    "too-much": lambda: validate.check_contiguous([event(1), event(2)], 1, 1),
    "no-opening-bookmark": lambda: stream(events(1)),
    "two-parts": lambda: stream(Response(events=[event(1)], bookmark=bookmark(1).bookmark)),
    "empty-message": lambda: stream(Response()),
    "bookmark-goes-back": lambda: stream(bookmark(5), bookmark(4)),
    "bookmark-behind-events": lambda: stream(bookmark(0), events(1, 2), bookmark(1)),
    "another-store": lambda: stream(bookmark(0), bookmark(1, "other")),
    "late-snapshot": lambda: stream(bookmark(0), snapshot("models/a")),
    "twice-in-snapshot": lambda: stream(snapshot("models/a"), snapshot("models/a")),
    "off-by-one-resume": lambda: validate.check_resumed(
        [stream(bookmark(0), events(1, 2)), stream(bookmark(3), events(4))]
    ),
    "gap-in-resumed": lambda: validate.check_resumed([stream(bookmark(0), events(1, 3))]),
    "told-twice": lambda: validate.check_same([event(1, Event.CREATED)], [event(1, Event.UPDATED)]),
    "filter-drops": lambda: validate.check_filtered(
        [event(1), event(2)], [event(1)], events_pb2.EventFilter(names=["models/a"])
    ),
    "filter-lets-pass": lambda: validate.check_filtered(
        [event(1)], [event(1)], events_pb2.EventFilter(names=["models/b"])
    ),
    "created-twice": lambda: validate.applied({"models/a": resource()}, [event(1, Event.CREATED)]),
    "updated-before-created": lambda: validate.applied({}, [event(1)]),
    "state-differs": lambda: validate.check_state(
        stream(snapshot("models/a"), bookmark(1)),
        {"models/a": resource(), "models/b": resource("models/b")},
    ),
    "not-deleted": lambda: validate.check_state(stream(snapshot("models/a"), bookmark(1)), {}),
}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(plant: Callable[[], object]) -> None:
    """Each broken promise raises ViolationError."""
    with pytest.raises(validate.ViolationError):
        plant()


def test_a_right_stream_passes() -> None:
    """Nothing is found where nothing is wrong."""
    one = stream(snapshot("models/b"), bookmark(3), events(4, 5), bookmark(5), bookmark(5))
    two = stream(bookmark(5), events(6), events(7, 8))
    assert [e.sequence for e in validate.check_resumed([one, two])] == [4, 5, 6, 7, 8]
    changes = [event(1, Event.CREATED), event(2), event(3, Event.DELETED), event(4, Event.CREATED)]
    assert validate.applied({}, changes) == {"models/a": resource()}
