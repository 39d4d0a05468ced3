"""Clients and watchers of a whole daemon, who write down what they were told until it is gone."""

import asyncio
import contextlib
import random
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf import duration_pb2, field_mask_pb2

from modelhost.oip import open_inference_pb2 as oip
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelhost.v1 import (
    host_service_pb2,
    model_service_pb2,
    models_pb2,
    operation_service_pb2,
    operations_pb2,
    residency_service_pb2,
    settings_pb2,
)
from modelhost.v1.host_service_pb2_grpc import HostServiceStub
from modelhost.v1.model_service_pb2_grpc import ModelServiceStub
from modelhost.v1.operation_service_pb2_grpc import OperationServiceStub
from modelhost.v1.residency_service_pb2_grpc import ResidencyServiceStub
from tests.kill.recording import WATCHERS, Recorder, Watcher

MODELS = 5
REPOS = 4
REVISIONS = ("main", "v2")
CLIENTS = 4
CALL_S = 30.0
WATCH = "/modelhost.v1.EventService/WatchEvents"
FINAL = (
    operations_pb2.Operation.SUCCEEDED,
    operations_pb2.Operation.FAILED,
    operations_pb2.Operation.CANCELLED,
)
BUGS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class Told(Exception):
    """A client was told something that nobody may ever be told."""


class Traffic:
    """What goes on between a start of the daemon and its end."""

    def __init__(
        self,
        target: str,
        admin: str,
        record: Recorder,
        *,
        number: int,
        seed: str,
        starts: Mapping[str, int],
        wanted: int,
    ) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._admin = grpc.aio.insecure_channel(admin)
        self._record = record
        self._number = number
        self._chance = random.Random(f"traffic {seed}")
        self._starts = starts
        self._wanted = wanted
        self.answered = asyncio.Event()
        """Set once so many inference requests were answered."""
        self._count = 0
        self._models = ModelServiceStub(self._channel)
        self._residency = ResidencyServiceStub(self._channel)
        self._operations = OperationServiceStub(self._channel)
        self._inference = GRPCInferenceServiceStub(self._channel)
        self._host = HostServiceStub(self._admin)
        self._known: list[str] = []
        self.calls = 0
        self.answers = 0
        """Inference requests that were answered, each by the model that was asked."""

    async def run(self) -> None:
        """Make traffic until the daemon is gone. Raises Told."""
        tasks = [asyncio.ensure_future(self._watch(watcher)) for watcher in WATCHERS]
        tasks += [asyncio.ensure_future(self._client()) for _ in range(CLIENTS)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._channel.close()
            await self._admin.close()

    async def _watch(self, watcher: Watcher) -> None:
        start = self._starts[watcher.name]
        self._record.opened(watcher.name, start)
        # As bytes: what came is written down before anything looks at it.
        call: Any = self._channel.unary_stream(WATCH)
        stream = call(watcher.request(start).SerializeToString())
        try:
            async for message in stream:
                self._record.message(watcher.name, message)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise Told(
                    f"'{watcher.name}' from {start}: {error.code()} {error.details()}"
                ) from error

    async def _client(self) -> None:
        verbs = {
            self._create: 4,
            self._update: 3,
            self._download: 5,
            self._infer: 4,
            self._load: 3,
            self._delete: 2,
            self._interrupt: 1,
            self._settings: 1,
            self._slot: 1,
            self._lease: 1,
            self._check: 1,
        }
        while True:
            (verb,) = self._chance.choices(list(verbs), list(verbs.values()))
            try:
                await verb()
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE and "WORKER_LOST" not in str(
                    error.trailing_metadata()
                ):
                    return
                if error.code() in BUGS:
                    raise Told(f"{verb.__name__}: {error.code()} {error.details()}") from error
                await asyncio.sleep(0)
            self.calls += 1

    # --- what clients do ------------------------------------------------------------------------

    def _any(self) -> str:
        return f"m{self._chance.randrange(MODELS)}"

    def _mark(self) -> str:
        self._count += 1
        return f"{self._number}.{self._count}"

    def _source(self) -> models_pb2.Source:
        revision = self._chance.choice(REVISIONS)
        uri = f"hf://org/r{self._chance.randrange(REPOS)}"
        return models_pb2.Source(uri=uri, revision=revision)

    def _told(self, model: models_pb2.Model) -> None:
        self._record.ack(model.name, uid=model.uid, display_name=model.display_name)

    def _began(self, operation: operations_pb2.Operation, request: str = "") -> None:
        self._record.ack(operation.name)
        if request:
            answer = operation.name.removeprefix("operations/")
            self._record.ack(f"requests/{request}", answer=answer)
        self._known.append(operation.name)

    async def _end(self, operation: operations_pb2.Operation, timeout_s: float) -> None:
        wait = operation_service_pb2.WaitOperationRequest(
            name=operation.name, timeout=_duration(timeout_s)
        )
        done = await self._operations.WaitOperation(wait, timeout=CALL_S)
        if done.state in FINAL:
            state = operations_pb2.Operation.State.Name(done.state)
            self._record.ack(done.name, state=state)

    async def _create(self) -> None:
        model = models_pb2.Model(
            source=self._source(), display_name=self._mark(), description="x" * 200
        )
        model.config.backend = "identity"
        model.config.autoload = self._chance.random() < 0.2
        request = model_service_pb2.CreateModelRequest(model=model, model_id=self._any())
        self._told(await self._models.CreateModel(request, timeout=CALL_S))

    async def _update(self) -> None:
        model = models_pb2.Model(name=f"models/{self._any()}", display_name=self._mark())
        paths = ["display_name"]
        if self._chance.random() < 0.5:
            model.source.CopyFrom(self._source())
            paths.append("source")
        request = model_service_pb2.UpdateModelRequest(
            model=model, update_mask=field_mask_pb2.FieldMask(paths=paths)
        )
        self._told(await self._models.UpdateModel(request, timeout=CALL_S))

    async def _download(self) -> None:
        request = model_service_pb2.DownloadModelRequest(
            name=f"models/{self._any()}",
            request_id=f"request-{self._mark()}",
        )
        operation = await self._models.DownloadModel(request, timeout=CALL_S)
        self._began(operation, request.request_id)
        await self._end(operation, 0.3)

    async def _delete(self) -> None:
        model = f"models/{self._any()}"
        if self._chance.random() < 0.5:
            files = model_service_pb2.DeleteModelFilesRequest(model=model, force=True)
            operation = await self._models.DeleteModelFiles(files, timeout=CALL_S)
        else:
            entry = model_service_pb2.DeleteModelRequest(name=model, force=True)
            operation = await self._models.DeleteModel(entry, timeout=CALL_S)
        self._began(operation)
        await self._end(operation, 0.3)

    async def _load(self) -> None:
        model = f"models/{self._any()}"
        if self._chance.random() < 0.6:
            load = residency_service_pb2.LoadModelRequest(name=model, download=True)
            operation = await self._residency.LoadModel(load, timeout=CALL_S)
        else:
            unload = residency_service_pb2.UnloadModelRequest(name=model)
            operation = await self._residency.UnloadModel(unload, timeout=CALL_S)
        self._began(operation)
        await self._end(operation, 0.1)

    async def _interrupt(self) -> None:
        if not self._known:
            return
        name = self._chance.choice(self._known)
        what = self._chance.random()
        if what < 0.4:
            cancel = operation_service_pb2.CancelOperationRequest(name=name)
            await self._operations.CancelOperation(cancel, timeout=CALL_S)
        elif what < 0.7:
            pause = operation_service_pb2.PauseOperationRequest(name=name)
            await self._operations.PauseOperation(pause, timeout=CALL_S)
        else:
            resume = operation_service_pb2.ResumeOperationRequest(name=name)
            await self._operations.ResumeOperation(resume, timeout=CALL_S)

    async def _settings(self) -> None:
        request = host_service_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(queue_limit=1_000 + self._number),
            update_mask=field_mask_pb2.FieldMask(paths=["queue_limit"]),
        )
        settings = await self._host.UpdateSettings(request, timeout=CALL_S)
        self._record.ack("settings", queue_limit=settings.queue_limit)

    async def _slot(self) -> None:
        slot = f"slots/s{self._chance.randrange(2)}"
        switch = residency_service_pb2.SwitchSlotRequest(slot=slot, model=f"models/{self._any()}")
        operation = await self._residency.SwitchSlot(switch, timeout=CALL_S)
        self._began(operation)
        await self._end(operation, 0.1)

    async def _lease(self) -> None:
        acquire = residency_service_pb2.AcquireLeaseRequest(
            model=f"models/{self._any()}", time_to_live=_duration(1.0)
        )
        lease = await self._residency.AcquireLease(acquire, timeout=CALL_S)
        self._record.ack(lease.name, change="CREATED")
        if self._chance.random() < 0.7:
            release = residency_service_pb2.ReleaseLeaseRequest(name=lease.name)
            await self._residency.ReleaseLease(release, timeout=CALL_S)
            self._record.ack(lease.name, change="DELETED")

    async def _check(self) -> None:
        """Have the disk checked beside all the traffic: a running daemon leaves nothing behind."""
        request = host_service_pb2.CheckStorageRequest()
        operation = await self._host.CheckStorage(request, timeout=CALL_S)
        self._began(operation)
        wait = operation_service_pb2.WaitOperationRequest(
            name=operation.name, timeout=_duration(CALL_S)
        )
        done = await self._operations.WaitOperation(wait, timeout=CALL_S)
        if found := done.check_storage_result.findings:
            raise Told(f"a check beside the traffic found {found}")

    async def _infer(self) -> None:
        data = self._chance.randbytes(64)
        name = self._any()
        request = oip.ModelInferRequest(model_name=name, raw_input_contents=[data])
        request.inputs.add(name="x", datatype="UINT8", shape=[64])
        response: Any = await self._inference.ModelInfer(request, timeout=CALL_S)
        if response.model_name != name or list(response.raw_output_contents) != [data]:
            raise Told(f"'{name}' was asked, '{response.model_name}' answered something else")
        self.answers += 1
        if self.answers >= self._wanted:
            self.answered.set()


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


async def unfinished_ended(target: str) -> None:
    """Wait until no operation of a daemon works any more; paused ones stay as they are."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = OperationServiceStub(channel)
        listing = operation_service_pb2.ListOperationsRequest(page_size=1000)
        while True:
            found = await stub.ListOperations(listing, timeout=CALL_S)
            waiting = [
                o.name
                for o in found.operations
                if o.state not in (*FINAL, operations_pb2.Operation.PAUSED)
            ]
            if not waiting:
                return
            wait = operation_service_pb2.WaitOperationRequest(
                name=waiting[0], timeout=_duration(CALL_S)
            )
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.WaitOperation(wait, timeout=CALL_S)
