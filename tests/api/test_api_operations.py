"""OperationService over a real socket: look, steer, wait, watch."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from modelhost.v1 import model_service_pb2, operations_pb2
from modelhost.v1 import operation_service_pb2 as pb
from modelhostd.api import operations
from tests.api.support import CALL_S, Served, failure, served

State = operations_pb2.Operation.State


async def _downloading(it: Served, name: str = "minilm") -> operations_pb2.Operation:
    """Return a download that stands still half-way."""
    await it.add(name)
    hold = it.running.world.downloads.hold(f"hf://org/{name}")
    request = model_service_pb2.DownloadModelRequest(name=f"models/{name}")
    operation = await it.tcp.models.DownloadModel(request, timeout=CALL_S)
    await hold.reached.wait()
    return operation


async def _call(it: Served, method: str, name: str) -> operations_pb2.Operation:
    request = getattr(pb, f"{method}Request")(name=name)
    return await getattr(it.tcp.operations, method)(request, timeout=CALL_S)


async def test_a_running_operation_shows_its_progress(tmp_path: Path) -> None:
    """GetOperation has state, phase, bytes and principal while the work goes on."""
    async with served(tmp_path) as it:
        started = await _downloading(it)
        operation = await _call(it, "GetOperation", started.name)
        assert operation.state == State.Value("RUNNING")
        assert operation.model == "models/minilm"
        assert operation.progress.total_bytes == 400
        assert 0 < operation.progress.done_bytes < 400
        assert operation.principal == f"tcp:{it.server.addresses[0]}"
        assert operation.HasField("start_time")
        assert not operation.HasField("end_time")


async def test_the_same_work_is_one_operation(tmp_path: Path) -> None:
    """A second DownloadModel joins the first, and both wait for the same end."""
    async with served(tmp_path) as it:
        started = await _downloading(it)
        request = model_service_pb2.DownloadModelRequest(name="models/minilm")
        assert (await it.user.models.DownloadModel(request, timeout=CALL_S)).name == started.name
        it.running.world.downloads.unhold("hf://org/minilm")
        assert (await it.end(started)).download_result.version == 1


async def test_an_operation_is_paused_resumed_and_cancelled(tmp_path: Path) -> None:
    """Each step answers with the operation, repeated ones are no error, wrong ones are WRONG_STATE."""
    async with served(tmp_path) as it:
        name = (await _downloading(it)).name
        for _ in range(2):
            paused = await _call(it, "PauseOperation", name)
            assert paused.state == State.Value("PAUSED")
        for _ in range(2):
            resumed = await _call(it, "ResumeOperation", name)
            assert resumed.state in (State.Value("QUEUED"), State.Value("RUNNING"))
        for _ in range(2):
            cancelled = await _call(it, "CancelOperation", name)
            assert cancelled.state == State.Value("CANCELLED")
        assert cancelled.error.reason == "CANCELLED"
        for method in ("PauseOperation", "ResumeOperation"):
            request = getattr(pb, f"{method}Request")(name=name)
            found = await failure(getattr(it.tcp.operations, method)(request))
            assert (found.reason, found.metadata["name"]) == ("WRONG_STATE", name)


async def test_priority_decides_who_goes_first(tmp_path: Path) -> None:
    """UpdateOperation moves a waiting download ahead; the queue position follows."""
    async with served(tmp_path) as it:
        for name in ("a", "b", "c"):
            await _downloading(it, name)
        waiting = []
        for name in ("d", "e"):
            await it.add(name)
            request = model_service_pb2.DownloadModelRequest(name=f"models/{name}")
            waiting.append((await it.tcp.models.DownloadModel(request, timeout=CALL_S)).name)
            await it.running.world.clock.advance(1.0)
        assert (await _call(it, "GetOperation", waiting[1])).queue_position == 2
        request = pb.UpdateOperationRequest(
            operation=operations_pb2.Operation(name=waiting[1], priority=9),
            update_mask=FieldMask(paths=["priority", "state"]),
        )
        updated = await it.tcp.operations.UpdateOperation(request, timeout=CALL_S)
        assert (updated.priority, updated.queue_position) == (9, 1)
        request.update_mask.paths[:] = ["rate_limit_bytes_per_second"]
        request.operation.rate_limit_bytes_per_second = 5
        updated = await it.tcp.operations.UpdateOperation(request, timeout=CALL_S)
        assert (updated.priority, updated.rate_limit_bytes_per_second) == (9, 5)
        request.operation.rate_limit_bytes_per_second = -5
        found = await failure(it.tcp.operations.UpdateOperation(request))
        assert found.reason == "INVALID_ARGUMENT"


async def test_the_files_of_a_download_are_shown_where_asked(tmp_path: Path) -> None:
    """Each with its bytes done and in all, in answers and streams; elsewhere none."""
    async with served(tmp_path) as it:
        name = (await _downloading(it)).name
        get = pb.GetOperationRequest(name=name)
        assert not (await it.tcp.operations.GetOperation(get, timeout=CALL_S)).progress.files
        get.include_files = True
        shown = await it.tcp.operations.GetOperation(get, timeout=CALL_S)
        assert [file.path for file in shown.progress.files] == ["config.json", "model.safetensors"]
        done = sum(file.done_bytes for file in shown.progress.files)
        assert 0 < done < sum(file.size_bytes for file in shown.progress.files)
        watch = pb.WatchOperationRequest(name=name, include_files=True)
        async for operation in it.tcp.operations.WatchOperation(watch, timeout=CALL_S):
            assert len(operation.progress.files) == 2
            break


async def test_operations_are_listed_newest_first(tmp_path: Path) -> None:
    """Filters by model, kind and state narrow the list; pages have each operation once."""
    async with served(tmp_path) as it:
        for name in ("a", "b"):
            await it.have(name)
            await it.running.world.clock.advance(1.0)
            await it.load(name)
            await it.running.world.clock.advance(1.0)

        async def found(**filters: Any) -> list[tuple[str, str]]:
            token, result = "", []
            while True:
                request = pb.ListOperationsRequest(page_size=1, page_token=token, **filters)
                page = await it.tcp.operations.ListOperations(request, timeout=CALL_S)
                kinds = operations_pb2.Operation.Kind
                result += [(kinds.Name(o.kind), o.model[-1]) for o in page.operations]
                token = page.next_page_token
                if not token:
                    return result

        every = [("LOAD", "b"), ("DOWNLOAD", "b"), ("LOAD", "a"), ("DOWNLOAD", "a")]
        assert await found() == every
        assert await found(model="models/a") == every[2:]
        assert await found(kinds=[operations_pb2.Operation.LOAD]) == every[::2]
        assert await found(states=[State.Value("FAILED")]) == []


async def test_waiting_returns_at_the_end_or_at_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WaitOperation answers a final operation at once, and an unfinished one as it is in time."""
    # What an answer may take on its way to the caller, however loaded the machine is.
    monkeypatch.setattr(operations, "ANSWER_MARGIN_S", 30.0)
    async with served(tmp_path) as it:
        name = (await _downloading(it)).name
        for timeout in (Duration(), Duration(nanos=50_000_000)):
            request = pb.WaitOperationRequest(name=name, timeout=timeout)
            answer = await it.tcp.operations.WaitOperation(request, timeout=CALL_S)
            assert answer.state == State.Value("RUNNING")
        short = await it.tcp.operations.WaitOperation(
            pb.WaitOperationRequest(name=name), timeout=30.5
        )
        assert short.state == State.Value("RUNNING")
        waiting = asyncio.ensure_future(_call(it, "WaitOperation", name))
        it.running.world.downloads.unhold("hf://org/minilm")
        assert (await waiting).state == State.Value("SUCCEEDED")
        assert (await _call(it, "WaitOperation", name)).state == State.Value("SUCCEEDED")


async def test_a_watch_shows_each_state_and_ends_after_the_last(tmp_path: Path) -> None:
    """The present state comes at once, each change follows, and the stream ends with OK."""
    async with served(tmp_path) as it:
        name = (await _downloading(it)).name
        watch = it.tcp.operations.WatchOperation(
            pb.WatchOperationRequest(name=name), timeout=CALL_S
        )
        states = []
        async for operation in watch:
            if not states:
                it.running.world.downloads.unhold("hf://org/minilm")
            states.append(State.Name(operation.state))
        assert (states[0], states[-1]) == ("RUNNING", "SUCCEEDED")
        again = it.tcp.operations.WatchOperation(
            pb.WatchOperationRequest(name=name), timeout=CALL_S
        )
        assert [State.Name(o.state) async for o in again] == ["SUCCEEDED"]


async def test_a_watcher_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    """The work goes on without its watcher and its caller."""
    async with served(tmp_path) as it:
        started = await _downloading(it)
        watch = it.user.operations.WatchOperation(pb.WatchOperationRequest(name=started.name))
        await watch.read()
        watch.cancel()
        await it.user.channel.close()
        it.running.world.downloads.unhold("hf://org/minilm")
        assert (await it.end(started)).download_result.size_bytes == 400
