"""The filter of events against the words of the contract, on events of every kind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhost.v1 import events_pb2
from modelhostd.api import convert, convert_values
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.event_filter import EventFilter, make_filter, resource_name
from modelhostd.core.resources import (
    Event,
    Instance,
    InstanceState,
    Kind,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Resource,
    Settings,
    Slot,
    Source,
    Tier,
)
from tests import event_validators as validate

MODELS = ["a", "ab", "a.b"]
model_ids = st.sampled_from(MODELS)


def model(key: str) -> Model:
    return Model(key, "uid", Source("hf://org/x"), 1.0, 1.0)


def resource_of(kind: Kind, key: str, of: str) -> Resource:
    match kind:
        case Kind.MODEL:
            return model(key)
        case Kind.INSTANCE:
            name, _, number = key.partition("/")
            return Instance(name, number, 1, "cpu", InstanceState.READY, Tier.DEVICE)
        case Kind.OPERATION:
            return Operation(key, OperationKind.LOAD, OperationState.QUEUED, 1.0, model=of)
        case Kind.SLOT:
            return Slot(key, of, 1.0)
        case _:
            return Settings()


@st.composite
def events(draw: st.DrawFn) -> Event:
    kind = draw(
        st.sampled_from([Kind.MODEL, Kind.INSTANCE, Kind.OPERATION, Kind.SLOT, Kind.SETTINGS])
    )
    of = draw(model_ids)
    key = {Kind.MODEL: of, Kind.INSTANCE: f"{of}/1", Kind.SETTINGS: "host"}.get(kind, "x-1")
    gone = draw(st.booleans())
    return Event(
        sequence=draw(st.integers(1, 1000)),
        time=1.0,
        kind=kind,
        key=key,
        resource=None if gone else resource_of(kind, key, of),
        reason=draw(st.sampled_from(["", "EVICTED", "CREATED"])),
        details={"model": of} if gone and draw(st.booleans()) else {},
    )


filters = st.builds(
    events_pb2.EventFilter,
    kinds=st.lists(st.integers(1, 7), max_size=2),
    names=st.lists(
        st.sampled_from(["models/a", "models/ab/instances/1", "operations/x-1", "settings"]),
        max_size=2,
    ),
    models=st.lists(st.sampled_from([f"models/{m}" for m in MODELS]), max_size=2),
    reasons=st.lists(st.sampled_from(["EVICTED", "CREATED"]), max_size=1),
)


def made(wanted: events_pb2.EventFilter) -> EventFilter:
    kinds = {number: kind for kind, number in convert.RESOURCE_KINDS.items()}
    return make_filter(
        [kinds[k] for k in wanted.kinds], wanted.names, wanted.models, wanted.reasons
    )


@given(events(), filters)
def test_a_filter_lets_pass_what_the_contract_says(
    event: Event, wanted: events_pb2.EventFilter
) -> None:
    """The filter inside and the contract's words, applied to the message, agree on every event."""
    assert made(wanted).passes(event) == validate.passes(wanted, convert.event(event))


@given(events())
def test_an_empty_filter_lets_everything_pass(event: Event) -> None:
    """A filter of four empty lists is no filter."""
    assert EventFilter().everything
    assert EventFilter().passes(event)


@given(events(), filters)
def test_a_snapshot_holds_what_its_events_could_tell_of(
    event: Event, wanted: events_pb2.EventFilter
) -> None:
    """A resource is in a filtered snapshot if its events pass, whatever their reason."""
    del wanted.reasons[:]
    if event.resource is not None:
        passes = made(wanted).passes_resource(event.kind, event.key, event.resource)
        assert passes == made(wanted).passes(event)


def test_names_are_full() -> None:
    """Keys of the tables become the names of the contract."""
    assert resource_name(Kind.MODEL, "a") == "models/a"
    assert resource_name(Kind.INSTANCE, "a/3") == "models/a/instances/3"
    assert resource_name(Kind.SETTINGS, "host") == "settings"
    for kind in Kind:
        assert resource_name(kind, "a/3") == convert_values.name_of(kind, "a/3")


@pytest.mark.parametrize(
    "path",
    [
        *("", "models", "models/", "models/A", "models/a/", "models/a/instances", "instances/1"),
        *("models/a/instances/", "models/a/other/1", "settings/x", "things/a", "models/a\n", "/"),
        "models/" + "a" * 65,
    ],
)
def test_a_name_that_nothing_can_have_is_refused(path: str) -> None:
    """A misspelt name would match nothing for ever, so it is INVALID_ARGUMENT."""
    with pytest.raises(ModelhostError) as caught:
        make_filter((), [path], (), ())
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == "filter.names[0]"
