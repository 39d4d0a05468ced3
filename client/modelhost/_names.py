"""Resource names from what people write: ``minilm`` is ``models/minilm``. The daemon checks the rest."""

from collections.abc import Iterable


def model_name(model: str) -> str:
    """Return ``models/{model}`` for an id or a name."""
    return _name("models", model)


def model_id(model: str) -> str:
    """Return the id, which is the model's name in inference requests; also of a slot's name."""
    return model.removeprefix("models/").removeprefix("slots/")


def model_names(models: Iterable[str]) -> list[str]:
    """Return the names of several models."""
    return [model_name(model) for model in models]


def instance_name(model: str) -> str:
    """Return the name of a model's only instance, for a model's id or name or an instance's name."""
    name = model_name(model)
    return name if "/instances/" in name else f"{name}/instances/-"


def operation_name(operation: str) -> str:
    """Return ``operations/{operation}`` for an id or a name."""
    return _name("operations", operation)


def device_name(device: str | None) -> str:
    """Return ``devices/{device}`` for an id or a name; empty for none."""
    return _name("devices", device) if device else ""


def slot_name(slot: str) -> str:
    """Return ``slots/{slot}`` for an id or a name."""
    return _name("slots", slot)


def quarantined_name(file: str) -> str:
    """Return ``quarantine/{quarantined_file}`` for an id or a name."""
    return _name("quarantine", file)


def short(name: str) -> str:
    """Return what people call a resource: the id behind the collection."""
    return name.partition("/")[2] or name


def _name(collection: str, text: str) -> str:
    return text if text.startswith(f"{collection}/") else f"{collection}/{text}"
