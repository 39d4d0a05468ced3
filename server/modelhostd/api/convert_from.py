"""What clients send, as values of core: parsed and checked in form, nothing looked up.

Everything that is wrong is INVALID_ARGUMENT and names the field as the request has it.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, Protocol

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value

from modelhost.v1 import models_pb2, settings_pb2
from modelhostd.core import names
from modelhostd.core.errors import invalid
from modelhostd.core.registry import LABELS_MAX, OPTIONS_MAX, ModelSpec
from modelhostd.core.resources import Isolation, ModelConfig, Requirements, Settings, Source
from modelhostd.host.registry import Request

WRITABLE_CONFIG = tuple(
    f"config.{field.name}" for field in models_pb2.ModelConfig.DESCRIPTOR.fields
)
WRITABLE_REQUIREMENTS = tuple(
    f"requirements.{field.name}" for field in models_pb2.Requirements.DESCRIPTOR.fields
)
WRITABLE_MODEL = (
    "display_name",
    "description",
    "labels",
    "licence",
    "task",
    "base_model",
    *WRITABLE_CONFIG,
    *WRITABLE_REQUIREMENTS,
    "source.uri",
    "source.revision",
    "source.allow_patterns",
    "source.ignore_patterns",
    "source.more_uris",
)
WRITABLE_SETTINGS = tuple(
    field.name
    for field in settings_pb2.Settings.DESCRIPTOR.fields
    if field.name not in ("name", "etag")
)

# Core says a duration's unit in the name; the wire's type says it there.
_CORE_NAMES: Mapping[str, str] = {
    "keep_alive": "keep_alive_s",
    "host_keep_alive": "host_keep_alive_s",
    "load_timeout": "load_timeout_s",
    "max_batch_delay": "max_batch_delay_s",
    "min_residency": "min_residency_s",
    "drain_timeout": "drain_timeout_s",
    "storage_ttl": "storage_ttl_s",
    "verify_interval": "verify_interval_s",
}

# Numbers of which zero is a value, not the absence of one.
_ZERO_SETTINGS = frozenset({"download_rate_limit_bytes_per_second", "disk_budget_bytes"})

DEVICE_BYTES_MAX = 1 << 50
PACKAGES_MAX = 64
TEXT_MAX = 256
OPTIONS = "model.config.backend_options"
OPTIONS_DEPTH_MAX = 16
OPTIONS_BYTES_MAX = 16 * 1024
ENTRIES_MAX = 100
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Enum(Protocol):
    """An enum of generated code."""

    def Name(self, number: Any) -> str:  # noqa: N802  (protobuf's own name)
        """Return the name of a value."""


# --- requests -----------------------------------------------------------------------------------


def request(method: str, message: Message) -> Request | None:
    """Return the request id of a message with a fingerprint of method and content, if it has one."""
    request_id: str = message.request_id  # type: ignore[attr-defined]
    if not request_id:
        return None
    if _REQUEST_ID.fullmatch(request_id) is None:
        raise invalid("request_id", "a UUID, or 1 to 64 of letters, digits and . _ : -", request_id)
    content = type(message)()
    content.CopyFrom(message)
    content.ClearField("request_id")
    encoded = content.SerializeToString(deterministic=True)
    digest = hashlib.sha256(method.encode() + b"\0" + encoded)
    return Request(request_id, digest.hexdigest())


def query(message: Message) -> str:
    """Return what a page token is bound to: the request without its page."""
    content = type(message)()
    content.CopyFrom(message)
    for name in ("page_size", "page_token"):
        content.ClearField(name)
    return content.DESCRIPTOR.name + content.SerializeToString(deterministic=True).hex()


def enum(field: str, kind: Enum, number: int) -> str:
    """Return the name of an enum's value; one that is unspecified or unknown is an error."""
    try:
        name = kind.Name(number)
    except ValueError:
        name = ""
    if not name or name.endswith("UNSPECIFIED"):
        raise invalid(field, "a value that the contract names", number)
    return name


def few(field: str, entries: Sized, most: int = ENTRIES_MAX, what: str = "entries") -> None:
    """Raise INVALID_ARGUMENT for too many entries, before the first is looked at.

    A control message holds a quarter of a million of them, which would hold the loop for half a second.
    """
    if len(entries) > most:
        raise invalid(field, f"at most {most} {what}", len(entries))


def enums(field: str, kind: Enum, numbers: Sequence[int]) -> frozenset[str]:
    """Return the names of a filter's enum values."""
    few(field, numbers)
    return frozenset(enum(field, kind, number) for number in numbers)


def seconds(field: str, given: Duration) -> float:
    """Return a Duration in seconds, or raise INVALID_ARGUMENT for one that is none."""
    mixed = (given.seconds > 0 > given.nanos) or (given.seconds < 0 < given.nanos)
    if abs(given.nanos) >= 1_000_000_000 or mixed or abs(given.seconds) > 315_576_000_000:
        raise invalid(field, "a Duration", f"{given.seconds} s and {given.nanos} ns")
    return float(given.seconds + given.nanos / 1e9)


def optional_id(collection: str, field: str, name: str) -> str:
    """Return the id of a name that may be empty."""
    return names.parse(collection, field, name) if name else ""


# --- models -------------------------------------------------------------------------------------


def source(given: models_pb2.Source) -> Source:
    """Return a source as it was given; the host puts it into its canonical form."""
    return Source(
        uri=given.uri,
        revision=given.revision,
        allow_patterns=tuple(given.allow_patterns),
        ignore_patterns=tuple(given.ignore_patterns),
        more_uris=tuple(given.more_uris),
    )


def spec(given: models_pb2.Model) -> ModelSpec:
    """Return the client-writable fields of a model."""
    few("model.labels", given.labels, LABELS_MAX, "labels")
    return ModelSpec(
        source=source(given.source),
        display_name=given.display_name,
        description=given.description,
        labels=dict(given.labels),
        licence=given.licence,
        task=given.task,
        config=config(given.config),
        requirements=requirements(given.requirements),
        base_model=optional_id("models", "model.base_model", given.base_model),
    )


def config(given: models_pb2.ModelConfig) -> ModelConfig:
    """Return a model's config; what is unset is None."""
    isolation = Isolation.SHARED
    if given.isolation:
        kind = models_pb2.ModelConfig.Isolation
        isolation = Isolation[enum("model.config.isolation", kind, given.isolation)]
    return ModelConfig(
        backend=given.backend,
        device=optional_id("devices", "model.config.device", given.device),
        precision=given.precision,
        max_batch_size=_present(given, "max_batch_size"),
        max_sequence_length=_present(given, "max_sequence_length"),
        keep_alive_s=_seconds(given, "keep_alive", "model.config"),
        host_keep_alive_s=_seconds(given, "host_keep_alive", "model.config"),
        fallback_model=optional_id("models", "model.config.fallback_model", given.fallback_model),
        load_timeout_s=_seconds(given, "load_timeout", "model.config"),
        load_on_demand=_present(given, "load_on_demand"),
        autoload=given.autoload,
        priority=given.priority,
        queue_limit=_present(given, "queue_limit"),
        isolation=isolation,
        backend_options=_options(given.backend_options),
        max_batch_delay_s=_seconds(given, "max_batch_delay", "model.config"),
        dynamic_batching=_present(given, "dynamic_batching"),
    )


def requirements(given: models_pb2.Requirements) -> Requirements:
    """Return what a model says that it needs."""
    field = "model.requirements"
    if not 0 <= given.device_bytes <= DEVICE_BYTES_MAX:
        raise invalid(f"{field}.device_bytes", f"0 to {DEVICE_BYTES_MAX}", given.device_bytes)
    if given.compute_capability and not re.fullmatch(
        r"[0-9]{1,3}(\.[0-9]{1,3})?", given.compute_capability
    ):
        expected = "a number like 8.0, or empty"
        raise invalid(f"{field}.compute_capability", expected, given.compute_capability)
    if len(given.packages) > PACKAGES_MAX:
        raise invalid(f"{field}.packages", f"at most {PACKAGES_MAX}", len(given.packages))
    for package in given.packages:
        if not 0 < len(package) <= TEXT_MAX or not package.isprintable():
            raise invalid(f"{field}.packages", f"1 to {TEXT_MAX} printable characters", package)
    return Requirements(
        device_bytes=given.device_bytes,
        compute_capability=given.compute_capability,
        packages=tuple(given.packages),
    )


def merged(current: ModelSpec, given: ModelSpec, paths: Iterable[str]) -> ModelSpec:
    """Return ``current`` with the fields of ``given`` that ``paths`` (leaves of WRITABLE_MODEL) name."""
    top: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path in paths:
        first, _, last = path.partition(".")
        value = getattr(given, first)
        if last:
            name = _CORE_NAMES.get(last, last)
            below.setdefault(first, {})[name] = getattr(value, name)
        else:
            top[first] = value
    for first, changes in below.items():
        top[first] = replace(getattr(current, first), **changes)
    return replace(current, **top)


# --- settings -----------------------------------------------------------------------------------


def settings(given: settings_pb2.Settings, paths: Iterable[str], default: Settings) -> Settings:
    """Return settings whose fields named by ``paths`` are the given ones.

    A field without a value is the default's: what the configuration says.
    """
    changes: dict[str, Any] = {}
    for path in paths:
        name = _CORE_NAMES.get(path, path)
        field = given.DESCRIPTOR.fields_by_name[path]
        if field.message_type is not None:
            unset = not given.HasField(path)  # type: ignore[arg-type]
            changes[name] = (
                getattr(default, name)
                if unset
                else seconds(f"settings.{path}", getattr(given, path))
            )
        elif field.has_presence:
            unset = not given.HasField(path)  # type: ignore[arg-type]
            changes[name] = getattr(default, name) if unset else getattr(given, path)
        else:
            # A bool has no "unset": false is a value.
            value = getattr(given, path)
            unset = not value and not isinstance(value, bool)
            zero = path in _ZERO_SETTINGS
            changes[name] = getattr(default, name) if unset and not zero else value
    return replace(default, **changes)


def core_names(paths: Iterable[str]) -> Sequence[str]:
    """Return the fields of core's Settings that paths of the wire's name."""
    return [_CORE_NAMES.get(path, path) for path in paths]


# --- small things -------------------------------------------------------------------------------


def _present(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _seconds(message: Any, name: str, prefix: str) -> float | None:
    if not message.HasField(name):
        return None
    return seconds(f"{prefix}.{name}", getattr(message, name))


def _options(given: Struct) -> Mapping[str, Any]:
    """Return a Struct as plain values; whole numbers become integers, which JSON cannot tell apart."""
    # Below the bound of each list and map there is room for lists of lists.
    if (size := given.ByteSize()) > OPTIONS_BYTES_MAX:
        raise invalid(OPTIONS, f"at most {OPTIONS_BYTES_MAX} bytes", f"{size} bytes")
    return _fields(given, OPTIONS_DEPTH_MAX)


def _fields(given: Struct, depth: int) -> Mapping[str, Any]:
    few(OPTIONS, given.fields, OPTIONS_MAX)
    return {key: _value(value, depth) for key, value in given.fields.items()}


def _value(value: Value, depth: int) -> Any:
    if depth == 0:
        raise invalid(OPTIONS, "at most 4 levels", "more levels")
    match value.WhichOneof("kind"):
        case "struct_value":
            return _fields(value.struct_value, depth - 1)
        case "list_value":
            few(OPTIONS, value.list_value.values, OPTIONS_MAX)
            return [_value(v, depth - 1) for v in value.list_value.values]
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case _:
            return None
