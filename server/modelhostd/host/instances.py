"""What a load and its end mean for the instance that is made for it."""

from collections.abc import Sequence
from dataclasses import replace

from modelhostd.core import operations as op_rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.resources import Instance, InstanceState, Model, Tier
from modelhostd.core.state import Edit
from modelhostd.host.crashes import Crashes
from modelhostd.host.occupancy import Occupancy, changed, gone
from modelhostd.host.wanted import Wanted


def first(occupancy: Occupancy, crashes: Crashes, wanted: Wanted, operation: str) -> Sequence[Edit]:
    """Return the edits that show a load as a QUEUED instance from the first moment on.

    While an old instance is on its way out, or warm, the new one is made when that has gone.
    """
    there = occupancy.routes.get(wanted.model) or wanted.model in occupancy.host.warm
    if wanted.generation or there:
        return ()
    model = occupancy.registry.decided.model(wanted.model)
    return queued(occupancy, crashes, wanted, model, operation)


def queued(
    occupancy: Occupancy, crashes: Crashes, wanted: Wanted, model: Model, operation: str
) -> Sequence[Edit]:
    """Return the edits that make a load's instance, in place of what remains of an old one."""
    old = occupancy.registry.decided.instance_of(model.id)
    wanted.generation = occupancy.next_generation()
    artifact = model.available
    made = Instance(
        model=model.id,
        id=str(wanted.generation),
        generation=wanted.generation,
        device=wanted.device,
        state=InstanceState.QUEUED,
        tier=Tier.DISK,
        artifact_version=artifact.version if artifact else 0,
        predicted_bytes=wanted.bytes - wanted.working_bytes,
        working_bytes=wanted.working_bytes,
        create_time=occupancy.registry.clock.time(),
        crash_count=crashes.count(model.id),
        config_edit=model.edit,
        operation=operation,
    )
    return [*(gone(old, "REPLACED") if old is not None else ()), *changed(made, "QUEUED")]


def remains(
    occupancy: Occupancy, crashes: Crashes, wanted: Wanted, error: ModelhostError
) -> Sequence[Edit]:
    """Return the edits that say what became of the instance of a load that did not end well."""
    instance = occupancy.registry.decided.instance_of(wanted.model)
    if instance is None or instance.generation != wanted.generation:
        return ()
    if instance.state in (InstanceState.WARM, InstanceState.DRAINING):
        return ()  # A copy that was not swapped in is where it was, or goes.
    if error.reason in (Reason.CANCELLED, Reason.SHUTTING_DOWN):
        return gone(instance, error.reason.value)
    blocked = crashes.blocked(wanted.model)
    state = InstanceState.BLOCKED if blocked is not None else InstanceState.FAILED
    failed = replace(
        instance,
        state=step(INSTANCE, instance.state, state),
        tier=Tier.DISK,
        host_bytes=0,
        working_bytes=0,
        error=op_rules.stored(blocked or error),
    )
    return changed(failed, "LOAD_FAILED", {"cause": error.reason.value})
