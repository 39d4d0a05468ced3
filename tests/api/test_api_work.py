"""What a request of 256 KiB costs the loop: counted in calls of functions, whatever the request holds."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest
from google.protobuf.struct_pb2 import Struct, Value

from modelhost.v1 import (
    event_service_pb2,
    host_service_pb2,
    model_service_pb2,
    models_pb2,
    operation_service_pb2,
    residency_service_pb2,
)
from tests.api.bad_input import answer
from tests.api.support import failure, served

CALLS_MAX = 20_000
"""A small request takes some hundreds. At 0.3 us for a call this is 6 ms; what is refused here took up to 450."""


def _create(**fields: Any) -> Any:
    made = model_service_pb2.CreateModelRequest(model_id="x", model=models_pb2.Model(**fields))
    made.model.source.uri = "hf://org/new"
    return made


def _options(fill: Callable[[Struct], object]) -> Any:
    made = _create()
    fill(made.model.config.backend_options)
    return made


def _many(made: Struct, kind: Value, count: int) -> None:
    made.fields["a"].list_value.values.extend([kind] * count)


def _empty_lists(made: Struct) -> None:
    for _ in range(40_000):
        made.fields["a"].list_value.values.add().list_value.SetInParent()


def _lists_of_lists(made: Struct) -> None:
    for outer in range(64):
        values = made.fields[str(outer)].list_value.values
        for _ in range(30):
            values.add().list_value.values.extend([Value(null_value=0)] * 32)  # type: ignore[arg-type]


def _keys(made: Struct) -> None:
    for number in range(20_000):
        made.fields[str(number)].SetInParent()


def _names(count: int) -> dict[str, str]:
    return {str(number): "" for number in range(count)}


REQUESTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "nulls": ("CreateModel", lambda: _options(lambda s: _many(s, Value(null_value=0), 60_000))),  # type: ignore[arg-type]
    "numbers": ("CreateModel", lambda: _options(lambda s: _many(s, Value(number_value=1.5), 20_000))),
    "lists of lists": ("CreateModel", lambda: _options(_lists_of_lists)),
    "lists": ("CreateModel", lambda: _options(_empty_lists)),
    "keys": ("CreateModel", lambda: _options(_keys)),
    "labels": ("CreateModel", lambda: _create(labels=_names(20_000))),
    "patterns": ("CreateModel", lambda: _create(
        source=models_pb2.Source(allow_patterns=["a"] * 80_000))),
    "packages": ("CreateModel", lambda: _create(
        requirements=models_pb2.Requirements(packages=["a"] * 80_000))),
    "one package": ("CreateModel", lambda: _create(
        requirements=models_pb2.Requirements(packages=["a>=1," + "<2," * 80_000]))),
    "labels to find": ("ListModels", lambda: model_service_pb2.ListModelsRequest(labels=_names(20_000))),
    "states of models": ("ListModels", lambda: model_service_pb2.ListModelsRequest(states=[1] * 250_000)),
    "states": ("ListInstances", lambda: residency_service_pb2.ListInstancesRequest(states=[1] * 250_000)),
    "kinds": ("ListOperations", lambda: operation_service_pb2.ListOperationsRequest(kinds=[1] * 250_000)),
    "names of events": ("ListEvents", lambda: _events(names=["models/a"] * 25_000)),
    "kinds of events": ("ListEvents", lambda: _events(kinds=[1] * 250_000)),
    "reasons of events": ("ListEvents", lambda: _events(reasons=["A"] * 80_000)),
    "figures": ("GetStatistics", lambda: host_service_pb2.GetStatisticsRequest(models=["models/a"] * 25_000)),
}  # fmt: skip


def _events(**fields: Any) -> Any:
    made = event_service_pb2.ListEventsRequest()
    for name, values in fields.items():
        getattr(made.filter, name).extend(values)
    return made


class Counter:
    """Counts the calls of functions, Python's own and those in C, of this thread."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> Self:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.calls += event in ("call", "c_call")


@pytest.mark.parametrize("name", REQUESTS)
async def test_no_request_holds_the_loop(tmp_path: Path, name: str) -> None:
    """Numbers of entries are judged before the entries: the first look refuses, not the last."""
    method, make = REQUESTS[name]
    request = make().SerializeToString()
    assert 100_000 < len(request) <= 256 * 1024
    async with served(tmp_path) as it:
        await it.add()
        with Counter() as counter:
            found = await failure(answer(it.admin.channel, method, [request]))
    assert found.reason == "INVALID_ARGUMENT"
    assert "at most" in found.message or "expected 1 to" in found.message
    assert counter.calls <= CALLS_MAX
