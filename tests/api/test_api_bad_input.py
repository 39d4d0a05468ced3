"""What bad input gets: code, reason and next step, before any side effect, and a daemon that goes on."""

from pathlib import Path

import grpc
import pytest

from modelhost.v1 import model_service_pb2, operation_service_pb2
from modelhostd.api.unimplemented import UNIMPLEMENTED_METHODS
from modelhostd.core.errors import ModelhostError, Reason
from tests.api import bad_models, bad_others
from tests.api.bad_input import METHODS, NEVER_REFUSED, Bad, answer
from tests.api.bad_models import MODEL
from tests.api.support import CALL_S, failure, served

CASES: list[Bad] = [*bad_models.CASES, *bad_others.CASES]

CODES = {
    "INVALID_ARGUMENT": (grpc.StatusCode.INVALID_ARGUMENT, "BadRequest"),
    "MODEL_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "INSTANCE_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "OPERATION_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "DEVICE_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "SLOT_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "LEASE_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "REGION_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "SOURCE_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "ALREADY_EXISTS": (grpc.StatusCode.ALREADY_EXISTS, "ResourceInfo"),
    "MODEL_NOT_DOWNLOADED": (grpc.StatusCode.FAILED_PRECONDITION, "PreconditionFailure"),
    "ETAG_MISMATCH": (grpc.StatusCode.ABORTED, "ErrorInfo"),
    "SEQUENCE_IN_FUTURE": (grpc.StatusCode.OUT_OF_RANGE, "ErrorInfo"),
    "PERMISSION_DENIED": (grpc.StatusCode.PERMISSION_DENIED, "ErrorInfo"),
    "UNIMPLEMENTED": (grpc.StatusCode.UNIMPLEMENTED, "ErrorInfo"),
}


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.id)
async def test_bad_input_is_told_and_changes_nothing(tmp_path: Path, bad: Bad) -> None:
    """Each wrong request gets its code, reason, details and next step; no event comes of it."""
    async with served(tmp_path) as it:
        await it.add()
        sequence = it.host.registry.journal.last_sequence
        found = await failure(answer(it.admin.channel, bad.method, [bad.request]))
        code, detail = CODES[bad.reason]
        assert (found.reason, found.code) == (bad.reason, code)
        assert detail in found.details
        for text in bad.says:
            assert text in found.message, found.message
        assert bad.metadata.items() <= found.metadata.items()
        assert found.request_id
        assert "\0" not in found.message
        assert it.host.registry.journal.last_sequence == sequence
        alive = model_service_pb2.GetModelRequest(name=MODEL)
        await it.user.models.GetModel(alive, timeout=CALL_S)


def test_every_method_is_in_the_table() -> None:
    """Each method that takes anything has a row of its own, or a reason why nothing is wrong for it."""
    missing = {name for name, m in METHODS.items() if m.input_type.fields}
    missing -= {bad.method for bad in CASES} | NEVER_REFUSED.keys()
    assert not missing, "methods without a row of bad input; add one to tests/api/bad_*.py"
    assert not NEVER_REFUSED.keys() & {bad.method for bad in CASES}


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x05ab"], ids=["garbage", "cut"])
async def test_bytes_that_are_no_message_are_refused_by_every_method(
    tmp_path: Path, data: bytes
) -> None:
    """Each method names the message that it takes; what is not offered says that first, if it can."""
    async with served(tmp_path) as it:
        for name, method in METHODS.items():
            if name in ("ModelInfer", "ModelStreamInfer"):
                continue
            found = await failure(answer(it.admin.channel, name, [data]))
            if f"{method.containing_service.full_name}/{name}" in UNIMPLEMENTED_METHODS:
                assert found.reason in ("INVALID_ARGUMENT", "UNIMPLEMENTED"), name
                continue
            assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", "request"), name
            assert method.input_type.full_name in found.message


SOURCE_FAILURES = {
    Reason.NETWORK_ERROR: grpc.StatusCode.UNAVAILABLE,
    Reason.OFFLINE: grpc.StatusCode.UNAVAILABLE,
    Reason.BAD_SOURCE_REPLY: grpc.StatusCode.UNAVAILABLE,
    Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.AUTHENTICATION_REQUIRED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.ACCESS_DENIED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.GATED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.SOURCE_NOT_ALLOWED: grpc.StatusCode.FAILED_PRECONDITION,
}


@pytest.mark.parametrize("reason", SOURCE_FAILURES)
async def test_a_source_that_is_unreachable_or_denied_is_told(
    tmp_path: Path, reason: Reason
) -> None:
    """By InspectSource at once, by a download in its operation; the model stays as it was."""
    uri = "hf://org/minilm"
    error = ModelhostError(reason, f"{uri}: no; do that next", {"source": uri}, retry_delay_s=7.0)
    async with served(tmp_path) as it:
        before = await it.add()
        it.running.world.downloads.fail(uri, error, times=2)
        request = model_service_pb2.InspectSourceRequest()
        request.source.uri = uri
        found = await failure(it.tcp.models.InspectSource(request))
        assert (found.reason, found.code) == (reason.value, SOURCE_FAILURES[reason])
        assert (found.metadata, found.message) == ({"source": uri}, error.message)
        assert found.details["RetryInfo"].retry_delay.seconds == 7  # type: ignore[attr-defined]
        download = model_service_pb2.DownloadModelRequest(name=MODEL)
        begun = await it.tcp.models.DownloadModel(download, timeout=CALL_S)
        ended = await it.tcp.operations.WaitOperation(
            operation_service_pb2.WaitOperationRequest(name=begun.name), timeout=CALL_S
        )
        assert (ended.error.reason, ended.error.message) == (reason.value, error.message)
        after = await it.tcp.models.GetModel(
            model_service_pb2.GetModelRequest(name=MODEL), timeout=CALL_S
        )
        assert (after.source, after.config) == (before.source, before.config)
        assert [artifact.error.reason for artifact in after.artifacts] == [reason.value]


async def test_a_page_token_belongs_to_its_query(tmp_path: Path) -> None:
    """A token of another query, of another list, or a changed one is INVALID_ARGUMENT."""
    async with served(tmp_path) as it:
        for name in ("a", "b", "c"):
            await it.add(name)
        request = model_service_pb2.ListModelsRequest(page_size=1)
        token = (await it.tcp.models.ListModels(request, timeout=CALL_S)).next_page_token
        for wrong in (
            model_service_pb2.ListModelsRequest(page_token=token, task="x"),
            model_service_pb2.ListModelsRequest(page_token=token[:-2]),
            model_service_pb2.ListModelsRequest(page_token="A" + token),
        ):
            found = await failure(it.tcp.models.ListModels(wrong))
            assert found.metadata.get("field") == "page_token", wrong
        other = operation_service_pb2.ListOperationsRequest(page_token=token)
        assert (await failure(it.tcp.operations.ListOperations(other))).reason == (
            "INVALID_ARGUMENT"
        )
        larger = model_service_pb2.ListModelsRequest(page_token=token, page_size=5)
        page = await it.tcp.models.ListModels(larger, timeout=CALL_S)
        assert [m.name for m in page.models] == ["models/b", "models/c"]


@pytest.mark.parametrize("method", ["CreateModel", "DownloadModel", "DeleteModel", "VerifyModel"])
async def test_a_request_id_is_for_one_request(tmp_path: Path, method: str) -> None:
    """The same id for another method or other content is REQUEST_ID_REUSED, and nothing happens."""
    async with served(tmp_path) as it:
        await it.have("other")
        await it.add()
        used = model_service_pb2.DownloadModelRequest(name="models/other", request_id="u-1")
        await it.tcp.models.DownloadModel(used, timeout=CALL_S)
        sequence = it.host.registry.journal.last_sequence
        request = getattr(model_service_pb2, f"{method}Request")(request_id="u-1")
        if method == "CreateModel":
            request.model.source.uri = "hf://org/new"
        else:
            request.name = MODEL
        found = await failure(getattr(it.tcp.models, method)(request))
        assert (found.reason, found.metadata) == ("REQUEST_ID_REUSED", {"requestId": "u-1"})
        assert "new id" in found.message
        assert it.host.registry.journal.last_sequence == sequence


async def test_an_oversized_message_is_refused_in_type(tmp_path: Path) -> None:
    """Control methods take 256 KiB, whatever the server takes for inference; grpc refuses the rest."""
    async with served(tmp_path) as it:
        request = model_service_pb2.CreateModelRequest(model_id="x")
        request.model.description = "x" * 300_000
        found = await failure(it.tcp.models.CreateModel(request))
        assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert found.reason == "MESSAGE_TOO_LARGE"
        assert found.metadata["limitBytes"] == "262144"
        request.model.description = "x" * 8_000_000
        found = await failure(it.tcp.models.CreateModel(request))
        assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not it.host.models.list()


async def test_bytes_that_are_no_message_are_refused(tmp_path: Path) -> None:
    """Garbage, cut messages, text that is not UTF-8 and deep nesting are INVALID_ARGUMENT."""
    deep = b""
    for _ in range(200):
        # config.backend_options of a model, a Struct in a Struct ...
        deep = b"\x0a" + _varint(len(deep)) + deep
    async with served(tmp_path) as it:
        call = it.tcp.raw("/modelhost.v1.ModelService/CreateModel")
        for data in (b"\xff\xff\xff", b"\x0a\x05ab", b"\x12\x02\xc3\x28"):
            found = await failure(call(data, timeout=CALL_S))
            assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", "request")
            assert "modelhost.v1.CreateModelRequest" in found.message
        await failure(call(deep, timeout=CALL_S))
        assert not it.host.models.list()


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])
