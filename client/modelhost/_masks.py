"""Changes as ``{path: value}`` into a message and the field mask that names them."""

import datetime as dt
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from modelhost._errors import invalid

M = TypeVar("M", bound=Message)

_DURATION = "google.protobuf.Duration"


def fill(message: Message, changes: Mapping[str, Any]) -> FieldMask:
    """Write ``changes`` into ``message`` and return their mask; None clears a field.

    Paths are those of the contract (``description``, ``config.keep_alive``); values what protobuf
    takes for the field: numbers, strings, lists, mappings; for a Duration a ``timedelta`` or seconds. Raises
    InvalidArgument for an unknown path or a value that does not fit; the daemon checks the rest.
    """
    for path, value in changes.items():
        target, field = _parent(message, path)
        if value is None:
            target.ClearField(field)
            continue
        target.MergeFrom(build(type(target), {field: value}, path))
    return FieldMask(paths=list(changes))


def build(kind: type[M], fields: Mapping[str, Any], path: str) -> M:
    """Return a message with ``fields``; ``path`` names it where they do not fit."""
    try:
        described = cast("Descriptor", kind.DESCRIPTOR)
        return kind(**{name: _value(described, name, v) for name, v in fields.items()})
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise invalid(path, f"values for {kind.DESCRIPTOR.name}", str(error)[:200]) from None


def as_message(kind: type[M], value: M | Mapping[str, Any], path: str) -> M:
    """Return ``value`` as a message of ``kind``: itself, or made from its fields."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise invalid(path, f"a {kind.DESCRIPTOR.name} or a dict", type(value).__name__)
    return build(kind, value, path)


def _value(message: Descriptor, name: str, value: Any) -> Any:
    """Return a value as protobuf takes it: a number for a Duration is in seconds."""
    name.encode()  # Of half a character protobuf would make a SystemError.
    field = message.fields_by_name.get(name)
    child = field.message_type if field is not None else None
    if child is None:
        return value
    if child.full_name == _DURATION and isinstance(value, int | float):
        return dt.timedelta(seconds=value)
    if (
        isinstance(value, Mapping)
        and not child.GetOptions().map_entry
        and child.file is message.file
    ):
        return {key: _value(child, key, inner) for key, inner in value.items()}
    return value


def _parent(message: Message, path: str) -> tuple[Message, str]:
    *parents, field = path.split(".")
    for part in parents:
        child = getattr(message, part, None)
        if not isinstance(child, Message):
            raise invalid("path", "a field of the contract", path)
        message = child
    if field not in message.DESCRIPTOR.fields_by_name:
        raise invalid("path", "a field of the contract", path)
    return message, field
