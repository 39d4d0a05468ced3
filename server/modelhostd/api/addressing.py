"""Which model a name means: an id, or a slot's and then the slot's model."""

from modelhostd.core import names
from modelhostd.core.resources import Instance
from modelhostd.core.state import State


def model_id(state: State, field: str, name: str) -> str:
    """Return the id of the model that ``models/{model}`` means.

    Raises INVALID_ARGUMENT for a malformed name, MODEL_NOT_FOUND for an unknown one.
    """
    key = names.parse("models", field, name)
    slot = state.slots.get(key)
    return state.model(slot.model if slot is not None else key).id


def plain_model_id(state: State, field: str, name: str) -> str:
    """As ``model_id`` for methods that end a model: a slot's name does not do."""
    return state.model(names.parse("models", field, name)).id


def instance(state: State, field: str, name: str) -> Instance:
    """Return the instance of a name; ``models/{model}/instances/-`` means the only one.

    Raises INVALID_ARGUMENT or INSTANCE_NOT_FOUND.
    """
    if name.endswith("/instances/-"):
        model = names.parse("models", field, name.removesuffix("/instances/-"))
        key = ""
    else:
        model, key = names.parse_instance(field, name)
    slot = state.slots.get(model)
    found = state.instance_of(slot.model if slot is not None else model)
    if found is None or key not in ("", found.id):
        hint = "it may be gone: ListInstances lists those that there are, LoadModel makes one"
        raise names.not_found("instances", name, hint)
    return found
