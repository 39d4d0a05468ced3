"""The registry's tables in memory, and the edits that change them.

Two states exist at run time: what has been *decided* (edits applied at once, the ground of the next
decision) and what has been *committed* (edits applied once they are durable, the ground of every read).
Values are immutable and shared by both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TypeVar, cast

from modelhostd.core.names import model_not_found, not_found
from modelhostd.core.resources import (
    FINAL_STATES,
    Device,
    Instance,
    Kind,
    Lease,
    Model,
    Operation,
    Resource,
    Settings,
    Slot,
)
from modelhostd.core.values import dataclass

SETTINGS_KEY = "host"


@dataclass(frozen=True, slots=True)
class Edit:
    """One resource after a change (None = gone), and why, for the event that tells of it."""

    kind: Kind
    key: str
    resource: Resource | None
    reason: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


def instance_key(model: str, instance: str) -> str:
    """Return the key of an instance: ``minilm/3``."""
    return f"{model}/{instance}"


class State:
    """Every resource by kind and key."""

    def __init__(self, tables: Mapping[Kind, Mapping[str, Resource]] | None = None) -> None:
        given = tables or {}
        self._tables: dict[Kind, dict[str, Resource]] = {
            kind: dict(given.get(kind, {})) for kind in Kind
        }

    def apply(self, edit: Edit) -> None:
        """Put or remove one resource."""
        self.put(edit.kind, edit.key, edit.resource)

    def put(self, kind: Kind, key: str, resource: Resource | None) -> None:
        """Put a resource at its key; None removes it."""
        if resource is None:
            self._tables[kind].pop(key, None)
        else:
            self._tables[kind][key] = resource

    def get(self, kind: Kind, key: str) -> Resource | None:
        """Return one resource, or None."""
        return self._tables[kind].get(key)

    def table(self, kind: Kind) -> Mapping[str, Resource]:
        """Return all of one kind, in the order they came."""
        return self._tables[kind]

    def copy(self) -> "State":
        """Return a state with tables of its own and the same values."""
        return State(self._tables)

    @property
    def models(self) -> Mapping[str, Model]:
        """Models by id."""
        return cast(Mapping[str, Model], self._tables[Kind.MODEL])

    @property
    def instances(self) -> Mapping[str, Instance]:
        """Instances by ``instance_key``."""
        return cast(Mapping[str, Instance], self._tables[Kind.INSTANCE])

    @property
    def operations(self) -> Mapping[str, Operation]:
        """Operations by id."""
        return cast(Mapping[str, Operation], self._tables[Kind.OPERATION])

    @property
    def devices(self) -> Mapping[str, Device]:
        """Devices by id."""
        return cast(Mapping[str, Device], self._tables[Kind.DEVICE])

    @property
    def slots(self) -> Mapping[str, Slot]:
        """Slots by id."""
        return cast(Mapping[str, Slot], self._tables[Kind.SLOT])

    @property
    def leases(self) -> Mapping[str, Lease]:
        """Leases by id."""
        return cast(Mapping[str, Lease], self._tables[Kind.LEASE])

    @property
    def settings(self) -> Settings:
        """The host's settings; defaults until they are first changed."""
        return cast(Settings, self._tables[Kind.SETTINGS].get(SETTINGS_KEY) or Settings())

    def model(self, key: str) -> Model:
        """Return a model or raise MODEL_NOT_FOUND."""
        found = self.models.get(key)
        if found is None:
            raise model_not_found(key)
        return found

    def operation(self, key: str) -> Operation:
        """Return an operation or raise OPERATION_NOT_FOUND."""
        return _found(self.operations, "operations", key)

    def device(self, key: str) -> Device:
        """Return a device or raise DEVICE_NOT_FOUND, naming those that there are."""
        found = self.devices.get(key)
        if found is None:
            raise not_found("devices", key, "devices here: " + ", ".join(sorted(self.devices)))
        return found

    def slot(self, key: str) -> Slot:
        """Return a slot or raise SLOT_NOT_FOUND."""
        found = self.slots.get(key)
        if found is None:
            hint = "ListSlots lists those that there are, SwitchSlot makes one"
            raise not_found("slots", key, hint)
        return found

    def instances_of(self, model: str) -> Iterator[Instance]:
        """Return the instances of one model."""
        return (i for i in self.instances.values() if i.model == model)

    def instance_of(self, model: str) -> Instance | None:
        """Return the model's instance, of which there is at most one."""
        return next(self.instances_of(model), None)

    def active_operation(self, join_key: str) -> Operation | None:
        """Return the unfinished operation that does this work already, if any."""
        return next(
            (
                o
                for o in self.operations.values()
                if o.join_key == join_key and o.state not in FINAL_STATES
            ),
            None,
        )


T = TypeVar("T")


def _found(table: Mapping[str, T], collection: str, key: str) -> T:
    found = table.get(key)
    if found is None:
        raise not_found(collection, key)
    return found
