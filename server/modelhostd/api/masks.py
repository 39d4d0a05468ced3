"""Field masks: which fields an update writes.

Paths are checked against the message's descriptor; fields that clients cannot write are ignored. See
``update_mask`` of UpdateModelRequest for the rules, which hold for every update.
"""

from collections.abc import Collection, Sequence
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from modelhostd.core.errors import invalid

PATHS_MAX = 100

# Well-known types are values: nothing below them can be named in a mask.
_VALUES = "google.protobuf."


def written(mask: FieldMask, message: Message, writable: Sequence[str]) -> Collection[str]:
    """Return the leaves of ``writable`` (dotted paths) that an update of ``message`` writes.

    No paths = the populated ones; ``*`` = all; a path stands for all leaves below it. Raises
    INVALID_ARGUMENT naming a path that the message does not have.
    """
    if len(mask.paths) > PATHS_MAX:
        raise invalid("update_mask", f"at most {PATHS_MAX} paths", len(mask.paths))
    if not mask.paths:
        return {path for path in writable if _populated(message, path)}
    chosen: set[str] = set()
    for path in mask.paths:
        if path == "*":
            chosen.update(writable)
            continue
        if not _known(message.DESCRIPTOR, path):
            expected = f"paths of {message.DESCRIPTOR.full_name}: {', '.join(writable)}, or *"
            raise invalid("update_mask", expected, path)
        chosen.update(p for p in writable if p == path or p.startswith(path + "."))
    return chosen


def _known(descriptor: Any, path: str) -> bool:
    names = path.split(".")
    for place, name in enumerate(names):
        field = descriptor.fields_by_name.get(name)
        if field is None:
            return False
        if place == len(names) - 1:
            return True
        below = field.message_type
        if below is None or not field.has_presence or below.full_name.startswith(_VALUES):
            return False
        descriptor = below
    return False


def _populated(message: Message, path: str) -> bool:
    *parents, last = path.split(".")
    for name in parents:
        if not message.HasField(name):
            return False
        message = getattr(message, name)
    field = message.DESCRIPTOR.fields_by_name[last]
    if field.has_presence:
        return message.HasField(last)
    return bool(getattr(message, last))
