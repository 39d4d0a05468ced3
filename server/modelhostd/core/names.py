"""Resource names and ids: the one place that takes them apart and puts them together.

``models/minilm`` -> ``minilm``; ``models/minilm/instances/3`` -> ``("minilm", "3")``.
"""

import re

from modelhostd.core.errors import ModelhostError, Reason, invalid

ID = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
ID_RULE = "1 to 64 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit"

_NOT_FOUND = {
    "models": Reason.MODEL_NOT_FOUND,
    "operations": Reason.OPERATION_NOT_FOUND,
    "devices": Reason.DEVICE_NOT_FOUND,
    "slots": Reason.SLOT_NOT_FOUND,
    "leases": Reason.LEASE_NOT_FOUND,
    "instances": Reason.INSTANCE_NOT_FOUND,
}
_KEY = {
    "models": "model",
    "operations": "operation",
    "devices": "device",
    "slots": "slot",
    "leases": "lease",
    "instances": "instance",
}


def check_id(field: str, value: str) -> str:
    """Return ``value`` if it is a valid id, else raise INVALID_ARGUMENT naming ``field``."""
    if ID.fullmatch(value) is None:
        raise invalid(field, ID_RULE, value)
    return value


def shown(text: str) -> str:
    """Return a caller's text for between quotes: at most 64 characters, with escapes for what could break a log line."""
    cut = text[:64]
    return cut if cut.isprintable() else repr(cut)[1:-1]


def parse(collection: str, field: str, name: str) -> str:
    """Return the id in ``{collection}/{id}``, or raise INVALID_ARGUMENT naming ``field``.

    A bare id is not a name: which collection it is of would have to be guessed.
    """
    prefix = collection + "/"
    if not name.startswith(prefix) or ID.fullmatch(name[len(prefix) :]) is None:
        raise invalid(field, f"a name like {collection}/{{id}}, the id of {ID_RULE}", name)
    return name[len(prefix) :]


def parse_instance(field: str, name: str) -> tuple[str, str]:
    """Return (model id, instance id) of ``models/{model}/instances/{instance}``."""
    parts = name.split("/")
    if (
        len(parts) != 4
        or parts[0] != "models"
        or parts[2] != "instances"
        or ID.fullmatch(parts[1]) is None
        or ID.fullmatch(parts[3]) is None
    ):
        raise invalid(field, "a name like models/{model}/instances/{instance}", name)
    return parts[1], parts[3]


def not_found(collection: str, key: str, hint: str = "") -> ModelhostError:
    """Return the NOT_FOUND error of one collection; ``hint`` says what to do next."""
    singular = _KEY[collection]
    return ModelhostError(
        _NOT_FOUND[collection],
        f"{singular} '{key}' is not known here" + (f"; {hint}" if hint else ""),
        {singular: key},
    )


def model_not_found(model: str) -> ModelhostError:
    """Return MODEL_NOT_FOUND with the next step."""
    return not_found("models", model, "`modelhost ls` lists the models, `modelhost pull` adds one")
