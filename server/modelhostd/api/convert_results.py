"""What came of an operation: core keeps it as a mapping by kind, the wire as one typed message each.

Keys are the message's field names. References are ids inside and full names on the wire.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from modelhost.v1 import instances_pb2, operations_pb2, storage_pb2
from modelhostd.core.resources import OperationKind

FINDINGS_MAX = 1000


def put(
    operation: operations_pb2.Operation, kind: OperationKind, result: Mapping[str, Any]
) -> None:
    """Set the result of a SUCCEEDED operation; the message is set even where all of it is zero."""
    match kind:
        case OperationKind.DOWNLOAD | OperationKind.UPLOAD:
            operation.download_result.CopyFrom(_download(result))
        case OperationKind.LOAD | OperationKind.RELOAD:
            operation.load_result.CopyFrom(_load(result))
        case OperationKind.UNLOAD:
            operation.unload_result.CopyFrom(
                operations_pb2.UnloadResult(
                    freed_bytes=result.get("freed_bytes", 0),
                    warm=result.get("warm", False),
                    freed_host_bytes=result.get("freed_host_bytes", 0),
                )
            )
        case OperationKind.VERIFY:
            operation.verify_result.CopyFrom(
                operations_pb2.VerifyResult(
                    file_count=result.get("file_count", 0),
                    size_bytes=result.get("size_bytes", 0),
                    findings=_findings(result),
                )
            )
        case OperationKind.PRUNE:
            operation.prune_result.CopyFrom(
                operations_pb2.PruneResult(
                    freed_bytes=result.get("freed_bytes", 0),
                    blob_count=result.get("blob_count", 0),
                    artifact_count=result.get("artifact_count", 0),
                    dry_run=result.get("dry_run", False),
                )
            )
        case OperationKind.SWITCH:
            operation.switch_result.CopyFrom(
                operations_pb2.SwitchResult(
                    slot=_named("slots", result.get("slot", "")),
                    model=_named("models", result.get("model", "")),
                    previous_model=_named("models", result.get("previous_model", "")),
                )
            )
        case OperationKind.DELETE:
            operation.delete_result.CopyFrom(
                operations_pb2.DeleteResult(freed_bytes=result.get("freed_bytes", 0))
            )
        case OperationKind.CHECK_STORAGE:
            operation.check_storage_result.CopyFrom(_check_storage(result))


def _download(result: Mapping[str, Any]) -> operations_pb2.DownloadResult:
    return operations_pb2.DownloadResult(
        model=_named("models", result.get("model", "")),
        version=result.get("version", 0),
        revision=result.get("revision", ""),
        file_count=result.get("file_count", 0),
        size_bytes=result.get("size_bytes", 0),
        reused_bytes=result.get("reused_bytes", 0),
    )


def _load(result: Mapping[str, Any]) -> operations_pb2.LoadResult:
    model, _, instance = str(result.get("instance", "")).partition("/")
    spent = None
    if result.get("load_s"):
        spent = Duration()
        spent.FromNanoseconds(round(result["load_s"] * 1e9))
    return operations_pb2.LoadResult(
        instance=f"models/{model}/instances/{instance}" if instance else "",
        device=_named("devices", result.get("device", "")),
        backend=result.get("backend", ""),
        measured_bytes=result.get("measured_bytes", 0),
        load_duration=spent,
        evicted_models=[_named("models", m) for m in result.get("evicted_models", ())],
        source_tier=instances_pb2.Instance.Tier.Value(
            result.get("source_tier", "TIER_UNSPECIFIED")
        ),
    )


def _check_storage(result: Mapping[str, Any]) -> operations_pb2.CheckStorageResult:
    findings: Sequence[Mapping[str, Any]] = result.get("findings", ())
    return operations_pb2.CheckStorageResult(
        findings=_findings(result),
        finding_count=result.get("finding_count", len(findings)),
        repaired_count=result.get("repaired_count", sum(bool(f.get("repaired")) for f in findings)),
    )


def _findings(result: Mapping[str, Any]) -> Sequence[storage_pb2.StorageFinding]:
    return [
        storage_pb2.StorageFinding(
            kind=f["kind"],
            name=f["name"],
            message=f["message"],
            repairable=f.get("repairable", False),
            repaired=f.get("repaired", False),
            expected_sha256=f.get("expected", ""),
            actual_sha256=f.get("actual", ""),
        )
        for f in result.get("findings", ())[:FINDINGS_MAX]
    ]


def _named(collection: str, key: str) -> str:
    return f"{collection}/{key}" if key else ""
