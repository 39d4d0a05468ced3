"""UploadModelFiles: the stream of a client, parsed step by step; how it is judged is the host's."""

from collections.abc import AsyncIterator

from modelhost.v1 import model_service_pb2 as pb
from modelhostd.api import convert_from, convert_models
from modelhostd.api.addressing import model_id
from modelhostd.api.calls import Call
from modelhostd.core.errors import invalid
from modelhostd.core.manifest import FILES_MAX
from modelhostd.core.uploads import (
    CHUNK_BYTES_MAX,
    UploadChunk,
    UploadCommit,
    UploadFile,
    UploadStart,
    UploadStep,
)
from modelhostd.host import Host

Requests = AsyncIterator[pb.UploadModelFilesRequest]


async def take(host: Host, requests: Requests, call: Call) -> pb.UploadModelFilesResponse:
    """Take one upload, or answer what is there of its files."""
    first = await anext(requests, None)
    if first is None:
        raise invalid("step", "start as the first message", "no message")
    state = host.registry.committed
    key = model_id(state, "model", first.model)
    if first.WhichOneof("step") != "start":
        raise invalid("step", "start as the first message", first.WhichOneof("step") or "none")
    start = UploadStart(first.start.revision, first.start.total_bytes)
    steps = _steps(requests)
    if first.start.dry_run:
        files = await _asked(steps)
        have = await host.uploads.have(key, files)
        return pb.UploadModelFilesResponse(
            model=convert_models.model(state.model(key)),
            files=[
                pb.UploadModelFilesResponse.File(path=file.path, have_bytes=count)
                for file, count in zip(files, have, strict=True)
            ],
        )
    # Not the bytes to come: of an upload that is made again, they are fewer.
    told = pb.UploadModelFilesRequest.Start(
        revision=start.revision, request_id=first.start.request_id
    )
    asked = convert_from.request(f"{call.method} {key}", told)
    model, version = await host.uploads.upload(key, start, steps, call.principal, asked)
    return pb.UploadModelFilesResponse(model=convert_models.model(model), version=version)


async def _steps(requests: Requests) -> AsyncIterator[UploadStep]:
    """Yield the steps behind the first message."""
    async for request in requests:
        match request.WhichOneof("step"):
            case "file":
                file = request.file
                yield UploadFile(file.path, file.size_bytes, file.sha256, file.offset_bytes)
            case "chunk":
                if len(request.chunk) > CHUNK_BYTES_MAX:
                    expected = f"at most {CHUNK_BYTES_MAX} bytes at once"
                    raise invalid("chunk", expected, f"{len(request.chunk)} bytes")
                yield UploadChunk(request.chunk)
            case "commit" if request.commit:
                yield UploadCommit()
            case other:
                raise invalid("step", "file, chunk or commit (true)", other or "none")


async def _asked(steps: AsyncIterator[UploadStep]) -> list[UploadFile]:
    """Return the files that a dry run asks for."""
    files: list[UploadFile] = []
    async for step in steps:
        if not isinstance(step, UploadFile):
            raise invalid("step", "only files in a dry run", type(step).__name__)
        if len(files) >= FILES_MAX:
            raise invalid("file", f"at most {FILES_MAX} files", len(files) + 1)
        files.append(step)
    return files
