"""How the contract's messages look as tables and as names with values."""

import datetime as dt
import json
from collections.abc import Iterable, Iterator

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from modelhost._enums import name_of
from modelhost._names import short
from modelhost._progress import amounts, phase_word
from modelhost._text import show_bytes, show_seconds
from modelhost.cli.output import Column, counted, joined
from modelhost.v1 import (
    host_pb2,
    instances_pb2,
    model_service_pb2,
    models_pb2,
    operations_pb2,
    slots_pb2,
)

Model = models_pb2.Model
Artifact = models_pb2.Artifact
Instance = instances_pb2.Instance
Operation = operations_pb2.Operation
Slot = slots_pb2.Slot
Health = instances_pb2.Health
Pairs = Iterator[tuple[str, object]]
Loaded = dict[str, Instance]


def size(value: object) -> str:
    """Return a number of bytes as people read it; nothing for none."""
    return show_bytes(int(str(value))) if value else "-"


def when(timestamp: Timestamp) -> str:
    """Return a time in RFC 3339 to the millisecond; empty for none."""
    if not timestamp.seconds:
        return ""
    return timestamp.ToDatetime(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def ago(text: object) -> str:
    """Return how long ago, or in how long, a time in RFC 3339 is."""
    if not text:
        return "-"
    moment = Timestamp()
    moment.FromJsonString(str(text))
    seconds = dt.datetime.now(dt.UTC).timestamp() - moment.ToNanoseconds() / 1e9
    return f"{show_seconds(seconds)} ago" if seconds >= 0 else f"in {show_seconds(-seconds)}"


def span(duration: Duration) -> str:
    """Return a span as people read it."""
    return show_seconds(duration.ToTimedelta().total_seconds())


def word(value: object) -> str:
    """Return a word, or a dash where there is none."""
    return str(value) or "-"


def yes(value: object) -> str:
    """Return ``yes``, or a dash."""
    return "yes" if value else "-"


def state_of(model: Model) -> str:
    """Return the state of a model's files."""
    return name_of(Artifact.State, model.state)


def current(model: Model) -> Artifact | None:
    """Return the artifact that a model's state is about."""
    whole = [a for a in model.artifacts if a.state == Artifact.AVAILABLE]
    return next(reversed(whole or model.artifacts), None)


def source_of(model: Model) -> str:
    """Return a model's source as it can be pulled."""
    source = model.source
    return source.uri + (f"@{source.revision}" if source.revision else "")


def model_columns(loaded: Loaded) -> list[Column[Model]]:
    """Return the columns of ``ls``; ``loaded`` has the instances by model."""

    def instance(model: Model) -> str:
        found = loaded.get(model.name)
        return name_of(Instance.State, found.state) if found is not None else ""

    def artifact_size(model: Model) -> int:
        found = current(model)
        return found.size_bytes if found is not None else 0

    return [
        Column("MODEL", lambda m: short(m.name)),
        Column("TASK", lambda m: m.task, word, extra=2),
        Column("FILES", state_of, str.lower),
        Column("SIZE", artifact_size, size, right=True),
        Column("INSTANCE", instance, lambda v: word(v).lower(), extra=1),
        Column("PINNED", lambda m: m.pinned, yes, extra=4),
        Column("SOURCE", source_of, word, extra=3),
    ]


def _config_value(field: FieldDescriptor, value: object) -> str:
    if isinstance(value, Duration):
        seconds = value.ToTimedelta().total_seconds()
        return "for ever" if seconds < 0 else show_seconds(seconds)
    if isinstance(value, Message):
        return json.dumps(MessageToDict(value), ensure_ascii=False)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(int(str(value)))
        return known.name.lower() if known is not None else str(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def model_pairs(model: Model) -> Pairs:
    """Return what ``show`` tells of a model."""
    yield "model", model.name
    yield "display name", model.display_name
    yield "description", model.description
    yield "task", model.task
    yield "licence", model.licence
    yield "source", source_of(model)
    yield "further files", " ".join(model.source.more_uris)
    yield "patterns", " ".join(model.source.allow_patterns)
    yield "left out", " ".join(model.source.ignore_patterns)
    yield "base model", model.base_model
    yield "labels", joined(model.labels)
    yield "files", state_of(model).lower()
    yield "pinned", "yes" if model.pinned else "no"
    for field, value in model.config.ListFields():
        if field.name == "isolation" and value == models_pb2.ModelConfig.SHARED:
            continue  # The default, which the daemon writes out.
        yield f"config.{field.name}", _config_value(field, value)
    yield "created", when(model.create_time)
    yield "uid", model.uid
    yield "etag", model.etag


ARTIFACT_COLUMNS: list[Column[Artifact]] = [
    Column("VERSION", lambda a: a.version, right=True),
    Column("STATE", lambda a: name_of(Artifact.State, a.state), str.lower),
    Column("REVISION", lambda a: a.revision, lambda v: word(v)[:12]),
    Column("FILES", lambda a: a.file_count, right=True),
    Column("SIZE", lambda a: a.size_bytes, size, right=True),
    Column("MEMORY", lambda a: a.predicted_bytes, size, right=True),
    Column("SINCE", lambda a: when(a.available_time) or when(a.create_time), ago),
    Column("ERROR", lambda a: a.error.message, word, prose=True),
]

SLOT_COLUMNS: list[Column[Slot]] = [
    Column("SLOT", lambda s: short(s.name)),
    Column("MODEL", lambda s: short(s.model)),
    Column("SWITCHED", lambda s: when(s.update_time), ago),
    Column("ETAG", lambda s: s.etag),
]


OPERATION_COLUMNS: list[Column[Operation]] = [
    Column("OPERATION", lambda o: short(o.name)),
    Column("KIND", lambda o: name_of(Operation.Kind, o.kind), str.lower, extra=1),
    Column("MODEL", lambda o: short(o.model), word),
    Column("STATE", lambda o: name_of(Operation.State, o.state), str.lower),
    Column("PROGRESS", amounts, word, extra=2),
    Column("CREATED", lambda o: when(o.create_time), ago, extra=4),
    Column("ERROR", lambda o: o.error.reason, word, extra=3),
    Column("QUEUE", lambda o: str(o.queue_position or ""), word, right=True, extra=5),
]


def operation_pairs(operation: Operation) -> Pairs:
    """Return what ``ops show`` tells of an operation."""
    yield "operation", operation.name
    yield "kind", name_of(Operation.Kind, operation.kind).lower()
    yield "model", operation.model
    yield "state", name_of(Operation.State, operation.state).lower()
    yield "phase", phase_word(operation)
    yield "progress", amounts(operation)
    yield "file", operation.progress.file
    yield "priority", operation.priority or ""
    yield "cancel requested", "yes" if operation.cancel_requested else ""
    yield "created", when(operation.create_time)
    yield "started", when(operation.start_time)
    yield "ended", when(operation.end_time)
    yield "asked for by", operation.principal
    yield "error", operation.error.message
    yield "result", outcome(operation)


def outcome(operation: Operation) -> str:
    """Return what a finished operation brought, in one sentence; empty for none."""
    kind = operation.WhichOneof("result")
    match kind:
        case "download_result":
            brought = operation.download_result
            return (
                f"{counted(brought.file_count, 'file')}, {show_bytes(brought.size_bytes)}"
                f" ({show_bytes(brought.reused_bytes)} already here), version {brought.version},"
                f" revision {brought.revision or '-'}"
            )
        case "load_result":
            loaded = operation.load_result
            evicted = ", ".join(short(model) for model in loaded.evicted_models)
            return (
                f"ready on {short(loaded.device)} in {span(loaded.load_duration)}, "
                f"{show_bytes(loaded.measured_bytes)}, backend {loaded.backend}"
                + (f"; evicted {evicted}" if evicted else "")
            )
        case "unload_result":
            from modelhost.cli.views_memory import unloaded

            return unloaded(operation.unload_result)
        case "delete_result":
            return f"{show_bytes(operation.delete_result.freed_bytes)} of disk are free again"
        case "verify_result":
            verified = operation.verify_result
            return f"{counted(verified.file_count, 'file')}, {counted(len(verified.findings), 'finding')}"
        case "prune_result":
            pruned = operation.prune_result
            freed = f"{show_bytes(pruned.freed_bytes)} of disk"
            return f"{freed} would be free" if pruned.dry_run else f"{freed} are free again"
        case "switch_result":
            return f"{operation.switch_result.slot} is {operation.switch_result.model} now"
        case "check_storage_result":
            checked = operation.check_storage_result
            return f"{counted(checked.finding_count, 'finding')}, {checked.repaired_count} repaired"
    return ""


CHECK_COLUMNS: list[Column[model_service_pb2.CheckCompatibilityResponse.Check]] = [
    Column("CHECK", lambda c: c.id),
    Column(
        "OUTCOME",
        lambda c: name_of(model_service_pb2.CheckCompatibilityResponse.Check.Outcome, c.outcome),
        str.lower,
    ),
    Column("NEEDED", lambda c: c.needed, word),
    Column("AVAILABLE", lambda c: c.available, word),
    Column("MESSAGE", lambda c: c.message, prose=True),
]

FILE_COLUMNS: list[Column[model_service_pb2.InspectSourceResponse.File]] = [
    Column("PATH", lambda f: f.path),
    Column("SIZE", lambda f: f.size_bytes, size, right=True),
]


SOURCE_COLUMNS: list[Column[host_pb2.Host.SourceStatus]] = [
    Column("SOURCE", lambda s: s.scheme),
    Column("STATE", lambda s: name_of(host_pb2.Host.SourceStatus.State, s.state), str.lower),
    Column("ASKED AT", lambda s: s.endpoint, word),
    Column("MESSAGE", lambda s: s.message, prose=True),
]

CREDENTIAL_COLUMNS: list[Column[host_pb2.Host.Credential]] = [
    Column("CREDENTIAL FOR", lambda c: c.origin, word),
    Column("STATE", lambda c: name_of(host_pb2.Host.Credential.State, c.state), str.lower),
    Column("KEPT IN", lambda c: c.kept_in),
    Column("MESSAGE", lambda c: c.message, prose=True),
]


def host_pairs(host: host_pb2.Host, target: str) -> Pairs:
    """Return what ``status`` tells of the daemon."""
    yield "daemon", f"modelhost {host.version} on {host.hostname or '-'}, process {host.pid}"
    yield "target", target
    yield "home", host.home
    yield "started", when(host.start_time)
    yield "listens on", ", ".join(listener.address for listener in host.listeners)
    yield "backends", ", ".join(b.id for b in host.backends if b.available)
    yield "sequence", host.sequence
    yield "you are", host.principal


def host_warnings(host: host_pb2.Host) -> Iterable[str]:
    """Return what on the host does not work, each with its reason."""
    unreachable = host_pb2.Host.SourceStatus.UNREACHABLE
    for source in host.sources:
        if source.state == unreachable:
            yield f"source {source.scheme} ({source.endpoint}) is unreachable: {source.message}"
    refused = {host_pb2.Host.Credential.REFUSED, host_pb2.Host.Credential.UNUSABLE}
    for credential in host.credentials:
        if credential.state in refused:
            why = credential.message or f"{credential.origin} does not know it"
            yield f"the credential in {credential.kept_in} is not accepted: {why}"
    for backend in host.backends:
        if not backend.available:
            yield f"backend {backend.id} is not available: {backend.message}"


def statistics_pairs(statistics: host_pb2.Statistics) -> Pairs:
    """Return what ``status`` tells of the figures."""
    yield "up", span(statistics.uptime)
    yield "models", statistics.model_count
    yield "requests", f"{statistics.request_count}, {statistics.error_count} with an error"
    yield "in flight", f"{statistics.in_flight}, {statistics.queued} queued"
    if statistics.host_tier_bytes:
        budget = show_bytes(statistics.host_tier_budget_bytes)
        yield (
            "host memory",
            f"{show_bytes(statistics.host_tier_bytes)} of {budget} for copies of weights",
        )
    rate = statistics.download_bytes_per_second
    yield "downloads", f"{show_bytes(int(rate))}/s" if rate else ""
