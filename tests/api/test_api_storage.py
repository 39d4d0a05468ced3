"""Pruning and quarantine over the wire."""

from dataclasses import replace
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp

from modelhost.v1 import host_service_pb2 as pb
from modelhost.v1 import operations_pb2, storage_pb2
from modelhostd.core.resources import Settings
from modelhostd.ports import Quarantined
from tests.api.support import CALL_S, failure, served

ENTRY = Quarantined(
    "1700000000-0123456789ab", "minilm", "w", "hf://org/minilm", 5, "e" * 64, "f" * 64, "why", 1.7e9
)


async def test_pruning_is_an_operation(tmp_path: Path) -> None:
    """PruneStorage needs the operator's right, and its result says what was freed."""
    async with served(tmp_path) as it:
        await it.have()
        it.running.world.files.blobs["0" * 64] = b"nobody's"
        request = pb.PruneStorageRequest(request_id="once")
        found = await failure(it.user.host.PruneStorage(request))
        assert (found.reason, found.metadata["right"]) == ("PERMISSION_DENIED", "OPERATE")
        operation = await it.admin.host.PruneStorage(request, timeout=CALL_S)
        done = await it.end(operation)
        assert done.kind == operations_pb2.Operation.PRUNE
        assert done.prune_result == operations_pb2.PruneResult(freed_bytes=8, blob_count=1)
        again = await it.admin.host.PruneStorage(request, timeout=CALL_S)
        assert again.name == operation.name


async def test_pruning_on_trial_says_what_it_would_do(tmp_path: Path) -> None:
    """A dry run has the numbers and takes nothing; it is another operation than the real one."""
    async with served(tmp_path) as it:
        await it.have()
        it.running.world.files.blobs["0" * 64] = b"nobody's"
        for dry_run in (True, True, False):
            request = pb.PruneStorageRequest(dry_run=dry_run)
            done = await it.end(await it.admin.host.PruneStorage(request, timeout=CALL_S))
            assert done.prune_result == operations_pb2.PruneResult(
                freed_bytes=8, blob_count=1, dry_run=dry_run
            )


async def test_storage_is_told_in_full(tmp_path: Path) -> None:
    """Per model what is its own, its last use and what keeps it; shared, promised and left bytes; hits."""
    async with served(tmp_path) as it:
        for model, size in (("a", 400), ("b", 900), ("c", 400)):
            await it.have(model, size)
        await it.host.update_settings(
            Settings(disk_budget_bytes=2000), ["disk_budget_bytes"], principal="t"
        )
        await it.running.load("b")
        storage = await it.tcp.host.GetStorage(pb.GetStorageRequest(), timeout=CALL_S)
        told = {m.model: (m.size_bytes, m.own_bytes, m.kept_by) for m in storage.models}
        assert told == {
            "models/b": (900, 898, "LOADED"),
            "models/a": (400, 0, ""),
            "models/c": (400, 0, ""),
        }
        used = {m.model for m in storage.models if m.HasField("last_use_time")}
        assert used == {"models/b"}
        assert storage.shared_bytes == 400
        assert storage.blob_bytes == 1298
        assert (storage.budget_bytes, storage.available_bytes) == (2000, 702)
        assert storage.reserved_bytes == 0
        assert (storage.hit_count, storage.miss_count, storage.fetched_bytes) == (2, 2, 1298)


async def test_quarantine_is_listed_in_pages(tmp_path: Path) -> None:
    """The newest first, all fields of an entry, of one model where asked for."""
    async with served(tmp_path) as it:
        await it.have()
        older = replace(ENTRY, name="1600000000-0123456789ab", model="", create_time=1.6e9)
        it.running.world.files.quarantine = {e.name: e for e in (older, ENTRY)}
        listing = it.user.host.ListQuarantine
        first = await listing(pb.ListQuarantineRequest(page_size=1), timeout=CALL_S)
        assert list(first.quarantined_files) == [
            storage_pb2.QuarantinedFile(
                name=f"quarantine/{ENTRY.name}",
                model="models/minilm",
                path="w",
                source="hf://org/minilm",
                size_bytes=5,
                expected_sha256="e" * 64,
                actual_sha256="f" * 64,
                message="why",
                create_time=Timestamp(seconds=1_700_000_000),
            )
        ]
        second = pb.ListQuarantineRequest(page_size=1, page_token=first.next_page_token)
        (last,) = (await listing(second, timeout=CALL_S)).quarantined_files
        assert (last.name, last.model) == (f"quarantine/{older.name}", "")
        of_model = pb.ListQuarantineRequest(model="models/minilm")
        assert len((await listing(of_model, timeout=CALL_S)).quarantined_files) == 1


async def test_quarantined_files_are_released_and_deleted_by_operators(tmp_path: Path) -> None:
    """Releasing answers with the model; deleting twice is no error; both need the right."""
    async with served(tmp_path) as it:
        await it.have()
        other = replace(ENTRY, name="1600000000-0123456789ab")
        it.running.world.files.quarantine = {e.name: e for e in (ENTRY, other)}
        restore = pb.RestoreQuarantinedRequest(name=f"quarantine/{ENTRY.name}")
        delete = pb.DeleteQuarantinedRequest(name=f"quarantine/{other.name}")
        for call in (
            it.user.host.RestoreQuarantined(restore),
            it.user.host.DeleteQuarantined(delete),
        ):
            assert (await failure(call)).reason == "PERMISSION_DENIED"
        model = await it.admin.host.RestoreQuarantined(restore, timeout=CALL_S)
        assert model.name == "models/minilm"
        for _ in range(2):
            await it.admin.host.DeleteQuarantined(delete, timeout=CALL_S)
        assert not it.running.world.files.quarantine
