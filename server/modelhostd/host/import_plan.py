"""Imports: what a document of models, slots, settings and budgets would change, decided before anything is."""

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, replace

from modelhostd.core import registry as rules
from modelhostd.core import slots, sources
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.names import check_id
from modelhostd.core.resources import Kind, Model, Settings
from modelhostd.core.settings import check_settings
from modelhostd.core.state import SETTINGS_KEY, Edit, State
from modelhostd.core.values import dataclass
from modelhostd.host.models import stale_instance

FAIL, SKIP, UPDATE = "FAIL", "SKIP", "UPDATE"

MODELS_AT_ONCE = 64
"""Between so many models others have their turn."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of a document."""

    id: str
    spec: rules.ModelSpec
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """The budget of one device."""

    id: str
    uuid: str
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """A slot and the model that it stands for."""

    id: str
    model: str


@dataclass(frozen=True, slots=True)
class Document:
    """A registry as a file holds it."""

    format: str
    version: int
    models: tuple[ModelEntry, ...]
    slots: tuple[SlotEntry, ...] = ()
    devices: tuple[DeviceEntry, ...] = ()
    settings: Settings | None = None


@dataclass(slots=True)
class ImportPlan:
    """An import as it is decided: edits, applied to a scratch state, and what they mean."""

    state: State
    now: float
    conflict: str
    edits: list[Edit] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    slots: list[str] = field(default_factory=list)
    settings_changed: bool = False
    other_tasks: list[Model] = field(default_factory=list)
    """Updated models whose task is another now."""
    relied_on: set[tuple[Kind, str]] = field(default_factory=set)
    """What must still be as it was when the edits are committed."""

    async def decide(self, document: Document, include_settings: bool) -> None:
        """Decide on a whole document. Raises INVALID_ARGUMENT, ALREADY_EXISTS or MODEL_NOT_FOUND."""
        seen: set[str] = set()
        for place, entry in enumerate(document.models):
            if entry.id in seen:
                raise invalid(f"models[{place}].id", "an id that comes once", entry.id)
            seen.add(entry.id)
            with _at(f"models[{place}]"):
                self._model(entry)
            if place % MODELS_AT_ONCE == 0:
                await asyncio.sleep(0)
        for place, slot in enumerate(document.slots):
            with _at(f"slots[{place}]"):
                self._slot(slot)
        if include_settings:
            self._settings(document)

    def _add(self, *edits: Edit) -> None:
        for edit in edits:
            self.state.apply(edit)
            self.edits.append(edit)
            self.relied_on.add((edit.kind, edit.key))

    def _model(self, entry: ModelEntry) -> None:
        spec = replace(entry.spec, source=sources.canonical_or_none(entry.spec.source))
        have = self.state.models.get(entry.id)
        if have is None:
            uid = str(uuid.uuid4())
            model = rules.create(self.state, entry.id, uid, spec, self.now, self.state.devices)
            self.created.append(entry.id)
            self._add(rules.model_edit(replace(model, pinned=entry.pinned), "IMPORTED"))
        elif self.conflict == SKIP:
            self.skipped.append(entry.id)
        elif self.conflict == UPDATE and have.source.uri == spec.source.uri:
            self._update(have, spec)
        else:
            raise _taken(have, spec, self.conflict)

    def _update(self, have: Model, spec: rules.ModelSpec) -> None:
        model = rules.update(have, spec, "", self.now, self.state.devices)
        if model is have:
            self.skipped.append(have.id)
            return
        self.updated.append(have.id)
        if model.task != have.task:
            self.other_tasks.append(model)
        self._add(rules.model_edit(model, "IMPORTED"), *stale_instance(self.state, have, model))

    def _slot(self, entry: SlotEntry) -> None:
        check_id("id", entry.id)
        have = self.state.slots.get(entry.id)
        if have is not None and have.model != entry.model and self.conflict != UPDATE:
            if self.conflict == SKIP:
                return
            raise ModelhostError(
                Reason.ALREADY_EXISTS,
                f"slot '{entry.id}' stands for model '{have.model}'; import with conflict SKIP or "
                f"UPDATE; nothing was imported",
                {"name": f"slots/{entry.id}"},
            )
        edits = slots.switched(self.state, entry.id, entry.model, "", self.now)
        if edits:
            self.slots.append(entry.id)
            self.relied_on.add((Kind.MODEL, entry.model))
            self._add(*edits)

    def _settings(self, document: Document) -> None:
        current = self.state.settings
        if document.settings is not None:
            settings = replace(document.settings, edit=current.edit)
            check_settings(settings)
            if settings != current:
                settings = replace(settings, edit=current.edit + 1)
                self._add(Edit(Kind.SETTINGS, SETTINGS_KEY, settings, "IMPORTED"))
                self.settings_changed = True
        by_uuid = {d.uuid: d for d in self.state.devices.values() if d.uuid}
        for place, entry in enumerate(document.devices):
            device = by_uuid.get(entry.uuid) or self.state.devices.get(entry.id)
            if device is None or device.budget_bytes == entry.budget_bytes:
                # Budgets of devices that this machine lacks say nothing about it.
                continue
            if not 0 < entry.budget_bytes <= device.total_bytes:
                field_path = f"devices[{place}].budget_bytes"
                raise invalid(field_path, f"1 to {device.total_bytes}", entry.budget_bytes)
            changed = replace(device, budget_bytes=entry.budget_bytes)
            self._add(Edit(Kind.DEVICE, device.id, changed, "BUDGET_CHANGED"))
            self.settings_changed = True


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say in which entry of the document an error is."""
    try:
        yield
    except ModelhostError as error:
        metadata = dict(error.metadata)
        if "field" in metadata:
            metadata["field"] = f"{where}: {metadata['field']}"
        raise ModelhostError(error.reason, f"{where}: {error.message}", metadata) from None


def _taken(have: Model, spec: rules.ModelSpec, conflict: str) -> ModelhostError:
    if conflict == UPDATE:
        why = f"has another source ({have.source.uri}, not {spec.source.uri}); delete it first"
    else:
        why = "exists already; import with conflict SKIP or UPDATE"
    return ModelhostError(
        Reason.ALREADY_EXISTS,
        f"model '{have.id}' {why}; nothing was imported",
        {"name": f"models/{have.id}"},
    )
