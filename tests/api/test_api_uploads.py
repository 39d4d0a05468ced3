"""UploadModelFiles as a client sees it: the stream, its operation, its artifact and its errors."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from modelhost.v1 import model_service_pb2 as pb
from modelhost.v1 import models_pb2, operation_service_pb2, operations_pb2
from modelhostd.host import receiving
from tests.api.support import CALL_S, Served, failure, served
from tests.support import wait_until_async

DATA = b"0123456789" * 1000
FILES = {"config.json": b"{}", "nested/data.txt": DATA, "empty.txt": b""}
NAME = "models/mine"
Request = pb.UploadModelFilesRequest


def start(model: str = NAME, **fields: Any) -> Request:
    """Return the first message."""
    return Request(model=model, start=Request.Start(**fields))


def file(path: str, data: bytes, offset: int = 0, sha256: str | None = None) -> Request:
    """Return the message that begins a file."""
    digest = hashlib.sha256(data).hexdigest() if sha256 is None else sha256
    return Request(
        file=Request.File(path=path, size_bytes=len(data), sha256=digest, offset_bytes=offset)
    )


def chunks(data: bytes) -> Iterator[Request]:
    """Return bytes in messages."""
    return (Request(chunk=data[at : at + 3000]) for at in range(0, len(data), 3000))


COMMIT = Request(commit=True)


def whole(files: Mapping[str, bytes], **fields: Any) -> list[Request]:
    """Return the messages of a whole upload."""
    messages = [start(**fields)]
    for path, data in files.items():
        messages += [file(path, data), *chunks(data)]
    return [*messages, COMMIT]


async def add(it: Served, model_id: str = "mine") -> models_pb2.Model:
    """Register a model without a source."""
    request = pb.CreateModelRequest(model_id=model_id)
    return await it.tcp.models.CreateModel(request, timeout=CALL_S)


def upload(it: Served, messages: Sequence[Request]) -> Any:
    """Call with these messages."""
    return it.tcp.models.UploadModelFiles(iter(messages), timeout=CALL_S)


async def state(it: Served) -> models_pb2.Model:
    """Return the model as it is."""
    return await it.tcp.models.GetModel(pb.GetModelRequest(name=NAME), timeout=CALL_S)


async def operations(it: Served) -> list[operations_pb2.Operation]:
    """Return every operation, newest first."""
    request = operation_service_pb2.ListOperationsRequest()
    return list((await it.tcp.operations.ListOperations(request, timeout=CALL_S)).operations)


class Open:
    """A stream that the test writes step by step."""

    def __init__(self, it: Served, *messages: Request) -> None:
        self._queue: asyncio.Queue[Request | None] = asyncio.Queue()
        for message in messages:
            self._queue.put_nowait(message)
        self.call = it.tcp.models.UploadModelFiles(self._messages(), timeout=CALL_S)

    async def _messages(self) -> AsyncIterator[Request]:
        while (message := await self._queue.get()) is not None:
            yield message

    def send(self, *messages: Request | None) -> None:
        """Send messages; None ends the stream."""
        for message in messages:
            self._queue.put_nowait(message)

    async def running(self, it: Served) -> operations_pb2.Operation:
        """Return the upload's operation once it runs."""

        async def found() -> operations_pb2.Operation | None:
            listed = [
                o for o in await operations(it) if o.state == operations_pb2.Operation.RUNNING
            ]
            return listed[0] if listed else None

        operation = await wait_until_async(found)
        assert operation is not None
        return operation


async def test_an_upload_becomes_an_artifact(tmp_path: Path) -> None:
    """A model without a source gets its files, an operation shows it, and loads take them."""
    async with served(tmp_path) as it:
        assert not (await add(it)).HasField("source")
        answer = await upload(it, whole(FILES, total_bytes=10_002))
        assert answer.version == 1
        assert answer.model.state == models_pb2.Artifact.AVAILABLE
        (artifact,) = answer.model.artifacts
        assert (artifact.size_bytes, artifact.file_count) == (10_002, 3)
        assert len(artifact.revision) == 64
        (operation,) = await operations(it)
        assert operation.kind == operations_pb2.Operation.UPLOAD
        assert operation.state == operations_pb2.Operation.SUCCEEDED
        assert operation.download_result.size_bytes == 10_002
        listed = await it.tcp.models.ListModelFiles(
            pb.ListModelFilesRequest(model=NAME), timeout=CALL_S
        )
        assert [f.path for f in listed.files] == sorted(FILES)
        download = it.tcp.models.DownloadModel(pb.DownloadModelRequest(name=NAME), timeout=CALL_S)
        found = await failure(download)
        assert found.reason == "WRONG_STATE"
        assert "modelhost upload" in found.message


async def test_a_dry_run_says_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    """After a broken stream: how many bytes of each file; with them the rest is enough."""
    async with served(tmp_path) as it:
        await add(it)
        upload_ = Open(it, start(), file("data.txt", DATA), *list(chunks(DATA))[:2])
        await upload_.running(it)
        parts = it.running.world.uploads.parts
        await wait_until_async(lambda: it.running.world.uploads.taken == 6000)
        upload_.call.cancel()
        await wait_until_async(lambda: parts)
        before = it.host.registry.journal.last_sequence
        asked = [start(dry_run=True), file("data.txt", DATA), file("config.json", b"{}")]
        answer = await wait_until_async(lambda: _quietly(upload(it, asked)))
        assert [(f.path, f.have_bytes) for f in answer.files] == [
            ("data.txt", 6000),
            ("config.json", 0),
        ]
        assert answer.version == 0
        assert it.host.registry.journal.last_sequence >= before
        rest = [start(total_bytes=4000), file("data.txt", DATA, 6000), *chunks(DATA[6000:]), COMMIT]
        # Version 1 was given out to what broke.
        assert (await upload(it, rest)).version == 2
        done = [o for o in await operations(it) if o.state == operations_pb2.Operation.SUCCEEDED]
        assert [o.download_result.reused_bytes for o in done] == [6000]


async def _quietly(call: Any) -> Any:
    """Return an answer, or None while the upload before it is not over."""
    with suppress(grpc.aio.AioRpcError):
        return await call


async def test_a_stream_that_breaks_between_two_files_publishes_nothing(tmp_path: Path) -> None:
    """Without commit it ended early, however whole its files are; the model is as before."""
    async with served(tmp_path) as it:
        await add(it)
        found = await failure(upload(it, whole(FILES)[:-1]))
        assert found.reason == "INVALID_ARGUMENT"
        assert "commit" in found.message
        upload_ = Open(it, *whole(FILES)[:-1])
        await upload_.running(it)
        upload_.call.cancel()
        await wait_until_async(lambda: _ended(it))
        assert {o.state for o in await operations(it)} == {operations_pb2.Operation.CANCELLED}
        assert list((await state(it)).artifacts) == []


async def _ended(it: Served) -> bool:
    running = operations_pb2.Operation.RUNNING
    return all(o.state != running for o in await operations(it))


async def test_an_upload_can_be_cancelled_by_its_operation(tmp_path: Path) -> None:
    """The caller is told CANCELLED, and no artifact is left of it."""
    async with served(tmp_path) as it:
        await add(it)
        upload_ = Open(it, start(), file("data.txt", DATA))
        operation = await upload_.running(it)
        request = operation_service_pb2.CancelOperationRequest(name=operation.name)
        await it.tcp.operations.CancelOperation(request, timeout=CALL_S)
        assert (await failure(upload_.call)).reason == "CANCELLED"
        assert list((await state(it)).artifacts) == []


async def test_a_deadline_ends_an_upload(tmp_path: Path) -> None:
    """The caller's own: what came is kept, the operation has ended."""
    async with served(tmp_path) as it:
        await add(it)
        queue: asyncio.Queue[Request] = asyncio.Queue()
        queue.put_nowait(start())

        async def messages() -> AsyncIterator[Request]:
            while True:
                yield await queue.get()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.tcp.models.UploadModelFiles(messages(), timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await wait_until_async(lambda: _ended(it))


async def test_a_drip_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's own limit for a whole upload: DEADLINE_EXCEEDED, and the model is free again."""
    monkeypatch.setattr(receiving, "UPLOAD_S", 0.1)
    async with served(tmp_path) as it:
        await add(it)
        found = await failure(Open(it, start(), file("data.txt", DATA)).call)
        assert (found.reason, found.metadata["method"]) == (
            "DEADLINE_EXCEEDED",
            "UploadModelFiles",
        )
        monkeypatch.undo()
        assert (await upload(it, whole(FILES))).model.state == models_pb2.Artifact.AVAILABLE


async def test_one_at_a_time_brings_files_of_a_model(tmp_path: Path) -> None:
    """Another upload or a download meanwhile: CONFLICTING_OPERATION that names the first."""
    async with served(tmp_path) as it:
        await it.add("mine")
        upload_ = Open(it, start(), file("data.txt", DATA))
        operation = await upload_.running(it)
        download = it.tcp.models.DownloadModel(pb.DownloadModelRequest(name=NAME), timeout=CALL_S)
        for call in (upload(it, whole(FILES)), download, upload(it, [start(dry_run=True)])):
            found = await failure(call)
            assert found.reason == "CONFLICTING_OPERATION"
            assert found.metadata["operation"] in operation.name
        upload_.send(*chunks(DATA), COMMIT, None)
        assert (await upload_.call).version == 1
        # The source's files are others: they are version 2, beside what was uploaded.
        done = await it.end(
            await it.tcp.models.DownloadModel(pb.DownloadModelRequest(name=NAME), timeout=CALL_S)
        )
        assert done.download_result.version == 2


async def test_deleting_by_force_ends_an_upload(tmp_path: Path) -> None:
    """Without force the model is in use; with it the caller is told, and nothing is left."""
    async with served(tmp_path) as it:
        await add(it)
        upload_ = Open(it, start(), file("data.txt", DATA))
        await upload_.running(it)
        found = await failure(it.tcp.models.DeleteModel(pb.DeleteModelRequest(name=NAME)))
        assert found.reason == "WRONG_STATE"
        deleted = pb.DeleteModelRequest(name=NAME, force=True)
        await it.end(await it.tcp.models.DeleteModel(deleted, timeout=CALL_S))
        assert (await failure(upload_.call)).reason == "CANCELLED"


async def test_the_same_files_again_are_the_same_version(tmp_path: Path) -> None:
    """Other files are a new one; other files under a revision that is taken are refused."""
    async with served(tmp_path) as it:
        await add(it)
        assert (await upload(it, whole(FILES, revision="r1"))).version == 1
        assert (await upload(it, whole(FILES, revision="r1"))).version == 1
        other = {**FILES, "config.json": b"{ }"}
        found = await failure(upload(it, whole(other, revision="r1")))
        assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", "start.revision")
        answer = await upload(it, whole(other, revision="r2"))
        available = [a for a in answer.model.artifacts if a.state == models_pb2.Artifact.AVAILABLE]
        assert [a.revision for a in available] == ["r1", "r2"]
        assert answer.version == available[-1].version


async def test_a_request_id_answers_an_upload_that_is_done(tmp_path: Path) -> None:
    """Made again it is not read; one that broke is made again under its id."""
    async with served(tmp_path) as it:
        await add(it)
        key = "8f7b9f0e-0000-4000-8000-000000000001"
        assert (await failure(upload(it, whole(FILES, request_id=key)[:-1]))).reason
        version = (await upload(it, whole(FILES, request_id=key, total_bytes=10_002))).version
        assert (await upload(it, [start(request_id=key)])).version == version
        found = await failure(upload(it, [start(request_id=key, revision="other")]))
        assert found.reason == "REQUEST_ID_REUSED"


WRONG: Mapping[str, tuple[Sequence[Request], str, str]] = {
    "too few bytes": ([start(), file("a.txt", DATA), *chunks(DATA[1:]), COMMIT],
        "INVALID_ARGUMENT", "10000 bytes of 'a.txt'"),
    "too many bytes": ([start(), file("a.txt", DATA), *chunks(DATA + b"x"), COMMIT],
        "INVALID_ARGUMENT", "got 'more'"),
    "more than the total": ([start(total_bytes=5), file("a.txt", DATA), *chunks(DATA)],
        "INVALID_ARGUMENT", "start.total_bytes"),
    "wrong digest": ([start(), file("a.txt", DATA, sha256="0" * 64), *chunks(DATA), COMMIT],
        "CHECKSUM_MISMATCH", "0" * 64),
    "offset": ([start(), file("a.txt", DATA, 5), *chunks(DATA[5:]), COMMIT],
        "INVALID_ARGUMENT", "file.offset_bytes"),
    "path": ([start(), file("../a.txt", DATA)], "INVALID_ARGUMENT", "file.path"),
    "pickle": ([start(), file("pytorch_model.bin", DATA)], "UNSAFE_FILE", "pickle"),
    "code": ([start(), file("modeling.py", DATA)], "UNSAFE_FILE", "code"),
    "no file": ([start(), COMMIT], "INVALID_ARGUMENT", "at least one file"),
    "chunk first": ([start(), *chunks(b"x")], "INVALID_ARGUMENT", "chunk"),
    "two starts": ([start(), start()], "INVALID_ARGUMENT", "step"),
    "false commit": ([start(), file("a.txt", b""), Request(commit=False)],
        "INVALID_ARGUMENT", "commit"),
    "nothing": ([start(), Request()], "INVALID_ARGUMENT", "step"),
    "large chunk": ([start(), file("a.txt", DATA * 50), Request(chunk=bytes(196_609))],
        "INVALID_ARGUMENT", "at most 196608"),
    "larger message": ([start(), file("a.txt", DATA * 50), Request(chunk=bytes(300_000))],
        "MESSAGE_TOO_LARGE", "262144"),
    "disk full": ([start(total_bytes=1 << 50)], "INSUFFICIENT_DISK_SPACE", "free"),
    "dry run with bytes": ([start(dry_run=True), file("a.txt", DATA), *chunks(b"x")],
        "INVALID_ARGUMENT", "dry run"),
    "dry run of a bad path": ([start(dry_run=True), file("a//b", DATA)],
        "INVALID_ARGUMENT", "file.path"),
    "dry run, disk full": ([start(dry_run=True), Request(file=Request.File(
        path="a.txt", size_bytes=1 << 49))], "INSUFFICIENT_DISK_SPACE", "free"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_stream_is_told_and_publishes_nothing(
    tmp_path: Path, wrong: tuple[Sequence[Request], str, str]
) -> None:
    """Each gets its reason and text, nothing becomes visible, and the next upload is taken."""
    messages, reason, text = wrong
    async with served(tmp_path) as it:
        await add(it)
        found = await failure(upload(it, messages))
        assert found.reason == reason, found
        assert text in found.message
        assert it.running.world.files.trees == {}
        assert (await upload(it, whole(FILES))).model.state == models_pb2.Artifact.AVAILABLE
