"""The registry as one JSON document: written piece by piece, read whole or not at all.

    {"format": "modelhost-registry", "version": 1, "store_id": "...", "sequence": 42,
     "settings": {...}, "devices": [{"id": "cuda-0", "uuid": "GPU-...", "budget_bytes": 1}],
     "slots": [{"id": "embedder", "model": "minilm"}],
     "models": [{"id": "minilm", "pinned": false, "spec": {"source": {...}, ...}}]}

``spec`` has the client-writable fields of a model as core names them. No files, no credentials: a source's
canonical URI carries none. A document of a higher version is refused, unknown fields are ignored.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import Device, Kind, Model, Settings
from modelhostd.core.state import Edit, State
from modelhostd.core.values import dataclass
from modelhostd.host.import_plan import MODELS_AT_ONCE, Document, ImportPlan
from modelhostd.host.registry import Registry, Request
from modelhostd.host.text_memories import TextMemories
from modelhostd.host.transfers import Transfers

FORMAT = "modelhost-registry"
VERSION = 1
CHUNK_BYTES_MAX = 64 * 1024
DOCUMENT_BYTES_MAX = 16 * 1024 * 1024
TRIES = 3


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did, or would do: ids of models and slots, whether settings or budgets changed."""

    created: Sequence[str] = ()
    updated: Sequence[str] = ()
    skipped: Sequence[str] = ()
    slots: Sequence[str] = ()
    settings_changed: bool = False


class RegistryIo:
    """Exports and imports the registry. ``check`` raises for edits that cannot be carried out."""

    def __init__(
        self,
        registry: Registry,
        transfers: Transfers,
        memories: TextMemories,
        check: Callable[[Iterable[Edit]], None],
    ) -> None:
        self._registry = registry
        self._transfers = transfers
        self._memories = memories
        self._check = check

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

        Raises INVALID_ARGUMENT, ALREADY_EXISTS, MODEL_NOT_FOUND (of a slot), BUDGET_TOO_SMALL, REQUEST_ID_REUSED.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return Imported(**json.loads(answered))
        for _ in range(TRIES):
            base = self._registry.decided.copy()
            plan = ImportPlan(base.copy(), self._registry.clock.time(), conflict)
            await plan.decide(document, include_settings)
            self._check(plan.edits)
            done = Imported(
                plan.created, plan.updated, plan.skipped, plan.slots, plan.settings_changed
            )
            if dry_run or not plan.edits:
                return done
            if self._unchanged(base, plan.relied_on):
                answer = json.dumps(asdict(done))
                await self._registry.stage(plan.edits, principal, request, answer)
                self._transfers.pump()
                await self._memories.take_up(plan.other_tasks)
                return done
        raise ModelhostError(
            Reason.CONFLICTING_OPERATION,
            "models of the document were changed while it was read; import it again",
        )

    def _unchanged(self, base: State, relied_on: Iterable[tuple[Kind, str]]) -> bool:
        """Whether what the plan relied on is what it was when it was decided."""
        now = self._registry.decided
        return all(now.get(kind, key) is base.get(kind, key) for kind, key in relied_on)


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
