"""Names, pages and request ids, wrong in the same ways in every method that has them, by the descriptors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from modelhost.v1 import host_service_pb2, model_service_pb2
from modelhostd.api.unimplemented import UNIMPLEMENTED_METHODS
from tests.api.bad_input import METHODS, answer
from tests.api.bad_models import BAD_IDS
from tests.api.support import CALL_S, failure, served

MODEL = "models/minilm"
FIELDS = {"name": MODEL, "model": MODEL, "device": "devices/sim-0", "slot": "slots/s"}
"""Fields that hold a name, and what is right in those that a test leaves alone."""

# Unset they mean all, or whichever is best.
OPTIONAL = {
    *(("ListInstances", field) for field in ("model", "device")),
    *((method, "model") for method in ("ListOperations", "ListSlots", "ListQuarantine")),
    *((method, "device") for method in ("LoadModel", "PlanLoad", "CheckCompatibility")),
}
# A model's name is the daemon's to give; there is one settings.
OUTPUT = {("CreateModel", "model"), ("UpdateSettings", "settings")}

BAD_NAMES = (
    *BAD_IDS.values(),
    *(f"{collection}/{bad}" for collection in ("models", "devices") for bad in BAD_IDS.values()),
    *("nothing", "nothing/x", "models/", "models/a/b/c", "leases/x/y", "slots//"),
)


def offered() -> Iterator[str]:
    """Yield the methods of our own services that are offered."""
    for name, method in METHODS.items():
        service = method.containing_service.full_name
        if service.startswith("modelhost.") and f"{service}/{name}" not in UNIMPLEMENTED_METHODS:
            yield name


def having(field: str) -> list[str]:
    """Return the methods that have a field."""
    return [name for name in offered() if field in METHODS[name].input_type.fields_by_name]


def named() -> Iterator[tuple[str, str, bool]]:
    """Yield method and field of each name; the last tells whether it stands in a resource."""
    for method in offered():
        for field in METHODS[method].input_type.fields:
            inner = field.message_type.fields_by_name if field.message_type else {}
            if (method, field.name) in OUTPUT or field.is_repeated:
                continue
            if "name" in inner or (field.name in FIELDS and not inner):
                yield method, field.name, bool(inner)


def right(method: str) -> Any:
    """Make a request that has the names right, as far as they are known."""
    request: Message = GetMessageClass(METHODS[method].input_type)()
    for field, value in FIELDS.items():
        found = METHODS[method].input_type.fields_by_name.get(field)
        if found is not None and found.message_type is None:
            setattr(request, field, value)
    return request


def test_the_methods_are_found() -> None:
    """What the others go through is not empty by mistake."""
    assert len(list(named())) >= 30
    assert {"DeleteModel", "ImportRegistry", "LoadModel"} <= set(having("request_id"))
    assert {"ListModels", "ListEvents", "ListDevices"} <= set(having("page_size"))


@pytest.mark.parametrize("name", list(named()), ids=lambda name: ".".join(name[:2]))
async def test_no_method_takes_a_malformed_name(
    tmp_path: Path, name: tuple[str, str, bool]
) -> None:
    """INVALID_ARGUMENT that names the field and how a name looks; nothing changes."""
    method, field, nested = name
    bad_names = BAD_NAMES if (method, field) in OPTIONAL else ("", *BAD_NAMES)
    async with served(tmp_path) as it:
        await it.have()
        sequence = it.host.registry.journal.last_sequence
        for bad in bad_names:
            request = right(method)
            if nested:
                getattr(request, field).name = bad
            else:
                setattr(request, field, bad)
            found = await failure(answer(it.admin.channel, method, [request]))
            assert (found.reason, bad) == ("INVALID_ARGUMENT", bad)
            assert found.metadata["field"] == (f"{field}.name" if nested else field), bad
            assert "{" in found.message, bad
            assert found.message.isprintable()
        assert it.host.registry.journal.last_sequence == sequence


@pytest.mark.parametrize("method", having("page_size"))
async def test_no_list_takes_a_negative_size_or_another_token(tmp_path: Path, method: str) -> None:
    """INVALID_ARGUMENT for a size below 0, and for every token that this query did not give."""
    async with served(tmp_path) as it:
        for name in ("a", "minilm"):
            await it.have(name)
        first = model_service_pb2.ListModelsRequest(page_size=1, states=[5, 4, 3, 2, 1])
        foreign = (await it.tcp.models.ListModels(first, timeout=CALL_S)).next_page_token
        assert foreign
        wrong: list[dict[str, Any]] = [{"page_size": -1}, {"page_size": -(2**31)}]
        wrong += [
            {"page_token": t} for t in (foreign, foreign[:-1], "garbage!", "A" * 5000, "\0", "é")
        ]
        for fields in wrong:
            request = right(method)
            for field, value in fields.items():
                setattr(request, field, value)
            found = await failure(answer(it.admin.channel, method, [request]))
            assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", *fields), fields


def _request(method: str, request_id: str) -> Any:
    """Make a request that would do something, with an id."""
    request = right(method)
    request.request_id = request_id
    if method == "CreateModel":
        request.ClearField("model")
        request.model.source.uri = "hf://org/new"
    if method == "ImportRegistry":
        request.chunk = b'{"format":"modelhost-registry","version":1,"models":[{"id":"new",'
        request.chunk += b'"spec":{"source":{"uri":"hf://org/new"}}}]}'
    if method == "DeleteModelFiles":
        request.version = 1
    return request


@pytest.mark.parametrize("method", having("request_id"))
async def test_no_method_takes_an_id_of_another_request(tmp_path: Path, method: str) -> None:
    """REQUEST_ID_REUSED for an id that another method had, INVALID_ARGUMENT for one that is none."""
    async with served(tmp_path) as it:
        await it.have("other")
        await it.have()
        if method == "CheckStorage":
            used: Any = model_service_pb2.DownloadModelRequest(name=MODEL, request_id="u-1")
            await it.tcp.models.DownloadModel(used, timeout=CALL_S)
        else:
            used = host_service_pb2.CheckStorageRequest(request_id="u-1")
            await it.end(await it.admin.host.CheckStorage(used, timeout=CALL_S))
        sequence = it.host.registry.journal.last_sequence
        found = await failure(answer(it.admin.channel, method, [_request(method, "u-1")]))
        assert (found.reason, found.metadata) == ("REQUEST_ID_REUSED", {"requestId": "u-1"})
        for bad in ("a\nb", " ", "x" * 65, "../x", "\u0661"):
            found = await failure(answer(it.admin.channel, method, [_request(method, bad)]))
            assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", "request_id"), (
                bad
            )
        assert it.host.registry.journal.last_sequence == sequence
