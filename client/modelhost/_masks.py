"""Changes as ``{path: value}`` into a message and the field mask that names them."""

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from modelhost._errors import invalid

M = TypeVar("M", bound=Message)


def fill(message: Message, changes: Mapping[str, Any]) -> FieldMask:
    """Write ``changes`` into ``message`` and return their mask; None clears a field.

    Paths are those of the contract (``description``, ``config.keep_alive``); values what protobuf
    takes for the field: numbers, strings, lists, mappings, ``timedelta`` for a Duration. Raises
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
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise invalid(path, f"values for {kind.DESCRIPTOR.name}", str(error)) from None


def as_message(kind: type[M], value: M | Mapping[str, Any], path: str) -> M:
    """Return ``value`` as a message of ``kind``: itself, or made from its fields."""
    if isinstance(value, Mapping):
        return build(kind, value, path)
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
