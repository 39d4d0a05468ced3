"""The registry as one JSON document: written piece by piece, read whole or not at all.

    {"format": "modelhost-registry", "version": 1, "store_id": "...", "sequence": 42,
     "settings": {...}, "devices": [{"id": "cuda-0", "uuid": "GPU-...", "budget_bytes": 1}],
     "slots": [], "models": [{"id": "minilm", "pinned": false, "spec": {"source": {...}, ...}}]}

``spec`` has the client-writable fields of a model as core names them. No files, no credentials: a source's
canonical URI carries none. A document of a higher version is refused, unknown fields are ignored.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec

from modelhostd.core import registry as rules
from modelhostd.core import sources
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import Device, Kind, Model, Settings
from modelhostd.core.settings import check_settings
from modelhostd.core.state import SETTINGS_KEY, Edit, State
from modelhostd.host.models import stale_instance
from modelhostd.host.registry import Registry, Request
from modelhostd.host.transfers import Transfers

FORMAT = "modelhost-registry"
VERSION = 1
CHUNK_BYTES_MAX = 64 * 1024
DOCUMENT_BYTES_MAX = 16 * 1024 * 1024
MODELS_AT_ONCE = 64
"""Between so many models others have their turn."""
TRIES = 3

FAIL, SKIP, UPDATE = "FAIL", "SKIP", "UPDATE"


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
class Document:
    """A registry as a file holds it."""

    format: str
    version: int
    models: tuple[ModelEntry, ...]
    slots: tuple[Mapping[str, Any], ...] = ()
    devices: tuple[DeviceEntry, ...] = ()
    settings: Settings | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did, or would do: model ids, and whether settings or budgets changed."""

    created: Sequence[str] = ()
    updated: Sequence[str] = ()
    skipped: Sequence[str] = ()
    settings_changed: bool = False


@dataclass(slots=True)
class _Plan:
    """An import as it is decided: edits, applied to a scratch state, and what they mean."""

    state: State
    now: float
    conflict: str
    edits: list[Edit] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    settings_changed: bool = False

    def add(self, *edits: Edit) -> None:
        for edit in edits:
            self.state.apply(edit)
            self.edits.append(edit)


class RegistryIo:
    """Exports and imports the registry."""

    def __init__(self, registry: Registry, transfers: Transfers) -> None:
        self._registry = registry
        self._transfers = transfers

    async def export(self) -> AsyncIterator[bytes]:
        """Yield the document in chunks of at most 64 KiB; all of it is as of one sequence.

        The sequence is that of the moment before the first chunk.
        """
        committed = self._registry.committed
        models = sorted(committed.models.values(), key=lambda m: m.id)
        head = {
            "format": FORMAT,
            "version": VERSION,
            "store_id": self._registry.store_id,
            "sequence": self._registry.journal.last_sequence,
            "settings": _settings(committed.settings),
            "devices": [_device(d) for d in committed.devices.values()],
            "slots": [{"id": s.id, "model": s.model} for s in committed.slots.values()],
        }
        ready = msgspec.json.encode(head)[:-1] + b',"models":['
        for start in range(0, len(models), MODELS_AT_ONCE):
            some = models[start : start + MODELS_AT_ONCE]
            encoded = [msgspec.json.encode(_entry(m), enc_hook=_plain) for m in some]
            ready += (b"," if start else b"") + b",".join(encoded)
            while len(ready) >= CHUNK_BYTES_MAX:
                yield ready[:CHUNK_BYTES_MAX]
                ready = ready[CHUNK_BYTES_MAX:]
            await asyncio.sleep(0)
        ready += b"]}\n"
        for start in range(0, len(ready), CHUNK_BYTES_MAX):
            yield ready[start : start + CHUNK_BYTES_MAX]

    async def read(self, document: bytes) -> Document:
        """Return a document as values. Raises INVALID_ARGUMENT for one that is none."""
        # Beside the loop: 16 MiB of JSON take a tenth of a second.
        return await asyncio.to_thread(_decode, document)

    async def apply(
        self,
        document: Document,
        *,
        conflict: str,
        include_settings: bool,
        dry_run: bool,
        principal: str = "",
        request: Request | None = None,
    ) -> Imported:
        """Import a document in one commit, or nothing of it.

        Raises INVALID_ARGUMENT, ALREADY_EXISTS, REQUEST_ID_REUSED, UNIMPLEMENTED (slots).
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return Imported(**json.loads(answered))
        for _ in range(TRIES):
            base = self._registry.decided.copy()
            plan = _Plan(base.copy(), self._registry.clock.time(), conflict)
            await _plan_all(plan, document, include_settings)
            done = Imported(plan.created, plan.updated, plan.skipped, plan.settings_changed)
            if dry_run or not plan.edits:
                return done
            if self._unchanged(base, plan.edits):
                answer = json.dumps(asdict(done))
                await self._registry.stage(plan.edits, principal, request, answer)
                self._transfers.pump()
                return done
        raise ModelhostError(
            Reason.CONFLICTING_OPERATION,
            "models of the document were changed while it was read; import it again",
        )

    def _unchanged(self, base: State, edits: Sequence[Edit]) -> bool:
        """Whether what the edits change is what it was when they were decided."""
        now = self._registry.decided
        return all(now.get(e.kind, e.key) is base.get(e.kind, e.key) for e in edits)


def _decode(document: bytes) -> Document:
    try:
        decoded = msgspec.json.decode(document, type=Document)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise invalid("chunk", "the JSON document that ExportRegistry made", str(error)) from None
    if decoded.format != FORMAT:
        raise invalid("chunk", f'a document with "format": "{FORMAT}"', decoded.format)
    if not 1 <= decoded.version <= VERSION:
        raise invalid("chunk", f"a document of version 1 to {VERSION}", decoded.version)
    return decoded


async def _plan_all(plan: _Plan, document: Document, include_settings: bool) -> None:
    if document.slots:
        raise ModelhostError(
            Reason.UNIMPLEMENTED,
            "slots are not implemented by this daemon yet; take them out of the document",
            {"method": "ImportRegistry"},
        )
    seen: set[str] = set()
    for place, entry in enumerate(document.models):
        if entry.id in seen:
            raise invalid(f"models[{place}].id", "an id that comes once", entry.id)
        seen.add(entry.id)
        _plan_model(plan, entry, f"models[{place}]")
        if place % MODELS_AT_ONCE == 0:
            await asyncio.sleep(0)
    if include_settings:
        _plan_settings(plan, document)


def _plan_model(plan: _Plan, entry: ModelEntry, where: str) -> None:
    try:
        source = entry.spec.source
        spec = replace(
            entry.spec,
            source=sources.parse_source(
                source.uri,
                revision=source.revision,
                allow_patterns=source.allow_patterns,
                ignore_patterns=source.ignore_patterns,
            ),
        )
        have = plan.state.models.get(entry.id)
        if have is None:
            model = rules.create(
                plan.state, entry.id, str(uuid.uuid4()), spec, plan.now, plan.state.devices
            )
            plan.created.append(entry.id)
            plan.add(rules.model_edit(replace(model, pinned=entry.pinned), "IMPORTED"))
            return
        if plan.conflict == SKIP:
            plan.skipped.append(entry.id)
        elif plan.conflict == UPDATE and have.source.uri == spec.source.uri:
            _plan_update(plan, have, spec)
        else:
            raise _taken(have, spec, plan.conflict)
    except ModelhostError as error:
        metadata = dict(error.metadata)
        if "field" in metadata:
            metadata["field"] = f"{where}: {metadata['field']}"
        raise ModelhostError(error.reason, f"{where}: {error.message}", metadata) from None


def _plan_update(plan: _Plan, have: Model, spec: rules.ModelSpec) -> None:
    model = rules.update(have, spec, "", plan.now, plan.state.devices)
    if model is have:
        plan.skipped.append(have.id)
        return
    plan.updated.append(have.id)
    plan.add(rules.model_edit(model, "IMPORTED"), *stale_instance(plan.state, have, model))


def _plan_settings(plan: _Plan, document: Document) -> None:
    current = plan.state.settings
    if document.settings is not None:
        settings = replace(document.settings, edit=current.edit)
        check_settings(settings)
        if settings != current:
            settings = replace(settings, edit=current.edit + 1)
            plan.add(Edit(Kind.SETTINGS, SETTINGS_KEY, settings, "IMPORTED"))
            plan.settings_changed = True
    by_uuid = {d.uuid: d for d in plan.state.devices.values() if d.uuid}
    for place, entry in enumerate(document.devices):
        device = by_uuid.get(entry.uuid) or plan.state.devices.get(entry.id)
        if device is None or device.budget_bytes == entry.budget_bytes:
            # Budgets of devices that this machine lacks say nothing about it.
            continue
        if not 0 < entry.budget_bytes <= device.total_bytes:
            field_path = f"devices[{place}].budget_bytes"
            raise invalid(field_path, f"1 to {device.total_bytes}", entry.budget_bytes)
        changed = replace(device, budget_bytes=entry.budget_bytes)
        plan.add(Edit(Kind.DEVICE, device.id, changed, "BUDGET_CHANGED"))
        plan.settings_changed = True


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


def _entry(model: Model) -> Mapping[str, Any]:
    return {"id": model.id, "pinned": model.pinned, "spec": asdict(rules.spec_of(model))}


def _settings(settings: Settings) -> Mapping[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name != "edit"}


def _device(device: Device) -> Mapping[str, Any]:
    return {"id": device.id, "uuid": device.uuid, "budget_bytes": device.budget_bytes}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be exported")
