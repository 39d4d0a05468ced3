"""Deletions of models: what stands in their way, and what goes with a model."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from modelhostd.core import leases, slots
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import FINAL_STATES, Instance, Kind, Model, OperationKind
from modelhostd.core.state import Edit, State


def in_use(model: Model, instance: Instance | None) -> ModelhostError:
    """Return the error of a deletion while the model is loaded, or (no instance) downloaded."""
    if instance is None:
        return _wrong_state(
            model, f"model '{model.id}' is being downloaded; cancel that, or delete with force"
        )
    return ModelhostError(
        Reason.MODEL_LOADED,
        f"model '{model.id}' has an instance ({instance.state.value} on devices/"
        f"{instance.device or 'none'}); unload it first, or delete with force",
        {"model": model.id, "instance": f"models/{model.id}/instances/{instance.id}"},
    )


def refuse_in_slot(state: State, model: Model) -> None:
    """Raise WRONG_STATE while a slot stands for the model: its callers would get nothing."""
    standing = slots.of_model(state, model.id)
    if standing:
        raise _wrong_state(
            model,
            f"slot '{standing[0].id}' stands for model '{model.id}'; switch or clear it first, or "
            "delete with force",
        )


def being_deleted(state: State) -> AbstractSet[str]:
    """Return the models that an unfinished deletion takes away, or files of them."""
    return {
        operation.model
        for operation in state.operations.values()
        if operation.kind is OperationKind.DELETE and operation.state not in FINAL_STATES
    }


def entry(state: State, model_id: str) -> Sequence[Edit]:
    """Return the edits that remove a model's entry, with the leases and slots that name it."""
    held = [lease for lease in state.leases.values() if lease.model == model_id]
    return [
        *(leases.ended(lease, "MODEL_DELETED") for lease in held),
        *slots.without_model(state, model_id),
        Edit(Kind.MODEL, model_id, None, "DELETED"),
    ]


def _wrong_state(model: Model, message: str) -> ModelhostError:
    metadata = {"name": f"models/{model.id}", "state": model.state.value}
    return ModelhostError(Reason.WRONG_STATE, message, metadata)
