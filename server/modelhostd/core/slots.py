"""Slots: stable names whose model can be switched. Decisions only."""

from collections.abc import Sequence

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.registry import check_etag
from modelhostd.core.resources import Kind, Slot
from modelhostd.core.state import Edit, State


def switched(state: State, key: str, model: str, etag: str, now: float) -> Sequence[Edit]:
    """Return the edits that make a slot stand for a model; none where it does so already.

    Raises MODEL_NOT_FOUND, ALREADY_EXISTS where a model has the slot's id, ETAG_MISMATCH, and
    INVALID_ARGUMENT for a model of another task: who calls the slot could not use its answers.
    """
    new = state.model(model)
    if key in state.models:
        raise ModelhostError(
            Reason.ALREADY_EXISTS,
            f"'{key}' is the id of a model, and a slot would hide it; choose another id for the slot",
            {"name": f"models/{key}"},
        )
    slot = state.slots.get(key)
    check_etag(f"slots/{key}", etag, str(slot.edit) if slot is not None else "")
    if slot is None:
        return [_edit(Slot(key, model, now), "SWITCHED", "")]
    if slot.model == model:
        return ()
    old = state.models.get(slot.model)
    if old is not None and old.task and new.task and old.task != new.task:
        raise invalid("model", f"a model of the slot's task, {old.task}", f"one of {new.task}")
    return [_edit(Slot(key, model, now, slot.edit + 1), "SWITCHED", slot.model)]


def cleared(slot: Slot, etag: str) -> Sequence[Edit]:
    """Return the edits that remove a slot. Raises ETAG_MISMATCH."""
    check_etag(f"slots/{slot.id}", etag, str(slot.edit))
    return [_gone(slot, "CLEARED")]


def of_model(state: State, model: str) -> Sequence[Slot]:
    """Return the slots that stand for a model."""
    return [slot for slot in state.slots.values() if slot.model == model]


def without_model(state: State, model: str) -> Sequence[Edit]:
    """Return the edits that remove the slots of a model that is being deleted."""
    return [_gone(slot, "MODEL_DELETED") for slot in of_model(state, model)]


def _edit(slot: Slot, reason: str, previous: str) -> Edit:
    return Edit(Kind.SLOT, slot.id, slot, reason, {"model": slot.model, "previousModel": previous})


def _gone(slot: Slot, reason: str) -> Edit:
    return Edit(Kind.SLOT, slot.id, None, reason, {"previousModel": slot.model})
