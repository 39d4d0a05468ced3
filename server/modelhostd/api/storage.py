"""The storage of HostService: parse, one call of the host, convert."""

from pathlib import Path

from google.protobuf.empty_pb2 import Empty

from modelhost.v1 import host_service_pb2 as pb
from modelhost.v1 import models_pb2, operations_pb2, storage_pb2
from modelhostd.api import convert, convert_from, convert_models, convert_values, lists
from modelhostd.api.addressing import plain_model_id
from modelhostd.api.calls import Call
from modelhostd.core import names
from modelhostd.host import Host
from modelhostd.ports import Quarantined

STORAGE_MODELS_MAX = 1000
QUARANTINE = "quarantine"
NEWEST = 10**12
"""Seconds since the epoch that no entry reaches: counted from there, the newest comes first."""


class StorageMethods:
    """What is on disk."""

    def __init__(self, host: Host, home: Path) -> None:
        self._host = host
        self._home = home

    async def get_storage(self, request: pb.GetStorageRequest, call: Call) -> storage_pb2.Storage:
        """See GetStorage in the contract."""
        report = await self._host.storage.report()
        use, room, uses = report.use, report.use.room, report.uses
        settings = self._host.registry.committed.settings
        return storage_pb2.Storage(
            home=str(self._home),
            blob_bytes=use.blob_bytes,
            blob_count=use.blob_count,
            staging_bytes=use.staging_bytes,
            quarantine_bytes=use.quarantine_bytes,
            reclaimable_bytes=use.reclaimable_bytes,
            free_bytes=use.free_bytes,
            total_bytes=use.total_bytes,
            models=[
                storage_pb2.Storage.ModelUse(
                    model=convert_values.named("models", m.model),
                    size_bytes=m.size_bytes,
                    own_bytes=m.own_bytes,
                    last_use_time=convert_values.timestamp(m.last_use),
                    kept_by=m.kept_by,
                )
                for m in report.models[:STORAGE_MODELS_MAX]
            ],
            shared_bytes=report.shared_bytes,
            budget_bytes=settings.disk_budget_bytes,
            reserved_bytes=room.reserved_bytes,
            available_bytes=room.available_bytes,
            hit_count=uses.hit_count,
            miss_count=uses.miss_count,
            fetched_bytes=uses.fetched_bytes,
        )

    async def check_storage(
        self, request: pb.CheckStorageRequest, call: Call
    ) -> operations_pb2.Operation:
        """See CheckStorage in the contract."""
        operation = await self._host.storage.check(
            deep=request.deep,
            repair=request.repair,
            principal=call.principal,
            request=convert_from.request(call.method, request),
        )
        return convert.operation(operation)

    async def prune_storage(
        self, request: pb.PruneStorageRequest, call: Call
    ) -> operations_pb2.Operation:
        """See PruneStorage in the contract."""
        operation = await self._host.storage.prune(
            call.principal, convert_from.request(call.method, request), dry_run=request.dry_run
        )
        return convert.operation(operation)

    async def list_quarantine(
        self, request: pb.ListQuarantineRequest, call: Call
    ) -> pb.ListQuarantineResponse:
        """See ListQuarantine in the contract."""
        model = ""
        if request.model:
            model = plain_model_id(self._host.registry.committed, "model", request.model)
        files, token = lists.page(
            request,
            await self._host.storage.quarantined(model),
            lambda q: f"{NEWEST - int(q.create_time):012d} {q.name}",
            _quarantined,
        )
        return pb.ListQuarantineResponse(
            quarantined_files=files,
            next_page_token=token,
            sequence=self._host.registry.journal.last_sequence,
            store_id=self._host.registry.store_id,
        )

    async def restore_quarantined(
        self, request: pb.RestoreQuarantinedRequest, call: Call
    ) -> models_pb2.Model:
        """See RestoreQuarantined in the contract."""
        name = names.parse(QUARANTINE, "name", request.name)
        return convert_models.model(await self._host.storage.restore_quarantined(name))

    async def delete_quarantined(self, request: pb.DeleteQuarantinedRequest, call: Call) -> Empty:
        """See DeleteQuarantined in the contract."""
        name = names.parse(QUARANTINE, "name", request.name)
        await self._host.storage.delete_quarantined(name)
        return Empty()


def _quarantined(given: Quarantined) -> storage_pb2.QuarantinedFile:
    return storage_pb2.QuarantinedFile(
        name=f"{QUARANTINE}/{given.name}",
        model=convert_values.named("models", given.model),
        path=given.path,
        source=given.source,
        size_bytes=given.size_bytes,
        expected_sha256=given.expected,
        actual_sha256=given.actual,
        message=given.message,
        create_time=convert_values.timestamp(given.create_time),
    )
