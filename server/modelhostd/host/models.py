"""Models as commands: registered, changed, deleted, pinned, exported and imported."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from modelhostd.core import deletions, sources
from modelhostd.core import operations as op_rules
from modelhostd.core import registry as rules
from modelhostd.core.artifacts import BRINGING
from modelhostd.core.errors import invalid
from modelhostd.core.resources import (
    FINAL_STATES,
    Artifact,
    Instance,
    InstanceState,
    Kind,
    Model,
    ModelFile,
    Operation,
    OperationKind,
    Phase,
    Source,
)
from modelhostd.core.state import Edit, State, instance_key
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.host.residency import Residency
from modelhostd.host.text_memories import TextMemories
from modelhostd.host.transfers import Transfers
from modelhostd.host.uploads import Uploads
from modelhostd.ports import Downloads, Files, SourceFacts

_UNUSED = (InstanceState.FAILED, InstanceState.BLOCKED, InstanceState.WARM)
"""An instance that nobody uses: it holds nothing, or a copy in host memory that no request has come back for."""


class Models:
    """The registry's models. Every change returns once it is durable."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        transfers: Transfers,
        uploads: Uploads,
        residency: Residency,
        downloads: Downloads,
        files: Files,
        memories: TextMemories,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._transfers = transfers
        self._uploads = uploads
        self._residency = residency
        self._downloads = downloads
        self._files = files
        self._memories = memories

    # --- reading --------------------------------------------------------------------------------

    def get(self, model_id: str) -> Model:
        """Return a model or raise MODEL_NOT_FOUND."""
        return self._registry.committed.model(model_id)

    def list(self) -> Sequence[Model]:
        """Return every model by id."""
        return sorted(self._registry.committed.models.values(), key=lambda m: m.id)

    async def files(self, model_id: str, version: int = 0) -> tuple[Artifact, Sequence[ModelFile]]:
        """Return an artifact of the model (0 = the newest available) and its files.

        Raises MODEL_NOT_DOWNLOADED when there is none.
        """
        found = rules.artifact_at(self.get(model_id), version)
        return found, await self._files.list_files(model_id, found.version)

    def local_path(self, model_id: str, version: int, path: str) -> str:
        """Return where one file of an artifact is on this machine."""
        return str(self._files.model_dir(model_id, version) / path)

    async def inspect(self, source: Source, *, allow_unsafe: bool = False) -> SourceFacts:
        """Ask a source what a download would fetch, without a byte of weights."""
        canonical = sources.canonical(source)
        return await self._downloads.inspect(canonical, allow_unsafe=allow_unsafe)

    # --- changing -------------------------------------------------------------------------------

    async def create(
        self,
        spec: rules.ModelSpec,
        model_id: str = "",
        principal: str = "",
        request: Request | None = None,
    ) -> Model:
        """Register a model; an empty id is derived from the source.

        A model without a source gets its files by upload. Raises ALREADY_EXISTS, INVALID_ARGUMENT.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self.get(answered)
        source = sources.canonical_or_none(spec.source)
        if not source.uri and not model_id:
            raise invalid(
                "model_id", "an id, since there is no source to derive one from", model_id
            )
        key = model_id or sources.derive_model_id(source)
        # Its namesake's files may be on their way out still: they would take the new one's along.
        op_rules.refuse_while_deleted(self._registry.decided.operations.values(), key)
        model = rules.create(
            self._registry.decided,
            key,
            str(uuid.uuid4()),
            replace(spec, source=source),
            self._registry.clock.time(),
            self._registry.decided.devices,
        )
        edits = [rules.model_edit(model, "CREATED")]
        await self._registry.stage(edits, principal, request, key)
        return model

    async def update(
        self,
        model_id: str,
        change: Callable[[rules.ModelSpec], rules.ModelSpec],
        etag: str = "",
        principal: str = "",
    ) -> Model:
        """Replace a model's client-writable fields by what ``change`` makes of them."""
        model = self._registry.decided.model(model_id)
        spec = change(rules.spec_of(model))
        spec = replace(spec, source=sources.canonical_or_none(spec.source))
        devices = self._registry.decided.devices
        now = self._registry.clock.time()
        updated = rules.update(model, spec, etag, now, devices)
        if updated is model:
            # Nothing to store, but what was read may not be durable yet.
            await self._registry.stage(())
            return model
        edits = [
            rules.model_edit(updated, "UPDATED"),
            *stale_instance(self._registry.decided, model, updated),
        ]
        await self._registry.stage(edits, principal)
        if updated.task != model.task:
            await self._memories.take_up([updated])
        return updated

    async def pin(self, model_id: str, pinned: bool, principal: str = "") -> Model:
        """Set or take an operator's pin: a pinned model is not evicted and loads at start.

        Raises MODEL_NOT_FOUND; MODEL_TOO_LARGE for the pin of one that is on disk and fits no device, however empty;
        OUT_OF_DEVICE_MEMORY for that of one that leaves because its device is above its budget.
        """
        model = self._registry.decided.model(model_id)
        edits: list[Edit] = []
        if model.pinned is not pinned:
            if pinned:
                self._residency.loads.check_can_fit(model)
                self._residency.budgets.check_hold(model_id)
            model = replace(model, pinned=pinned, update_time=self._registry.clock.time())
            edits.append(rules.model_edit(model, "PINNED" if pinned else "UNPINNED"))
        done = self._registry.stage(edits, principal)
        self._residency.loads.pump()
        await done
        return model

    async def delete(
        self,
        model_id: str,
        *,
        force: bool,
        keep_entry: bool = False,
        version: int = 0,
        etag: str = "",
        principal: str = "",
        request: Request | None = None,
    ) -> Operation:
        """Delete a model, or only its files (``keep_entry``); a loaded one only with ``force``.

        The operation drains and frees the instance first, then removes files and entry. ``version``
        narrows it to one artifact (0 = all), and is for ``keep_entry`` only.
        """
        assert keep_entry or not version
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        model = self._registry.decided.model(model_id)
        rules.check_etag(f"models/{model_id}", etag, model.etag)
        instance = self._user_of(model_id, version)
        if instance is not None and instance.state in _UNUSED:
            instance = None
        if not force and (instance is not None or self._downloading(model, version)):
            raise deletions.in_use(model, instance)
        if not force and not keep_entry:
            deletions.refuse_in_slot(self._registry.decided, model)
        work = partial(self._delete, model_id, keep_entry, version)
        return await self._operations.start(
            OperationKind.DELETE,
            model=model_id,
            join_key=op_rules.delete_key(model_id, keep_entry, version),
            principal=principal,
            request=request,
            begun=lambda o: self._operations.run(o.id, Phase.DRAINING, work),
        )

    # --- the work behind ------------------------------------------------------------------------

    async def _delete(self, model_id: str, keep_entry: bool, version: int) -> Mapping[str, object]:
        """Drain, then the row and its event, then the files: a crash between leaves only strays."""
        model = self._registry.decided.model(model_id)
        if self._downloading(model, version):
            await self._transfers.abandon(model_id)
            await self._uploads.abandon(model_id)
        if not version or self._user_of(model_id, version) is not None:
            await self._residency.remove(model_id, "MODEL_DELETED")
        artifacts = self._registry.decided.model(model_id).artifacts
        versions = [a.version for a in artifacts if version in (0, a.version)]
        await self._registry.stage(self._removed(model_id, keep_entry, versions))
        freed = 0
        for gone in versions:
            freed += await self._files.delete_artifact(model_id, gone)
        return {"freed_bytes": freed}

    def _removed(self, model_id: str, keep_entry: bool, versions: Sequence[int]) -> Sequence[Edit]:
        model = self._registry.decided.model(model_id)
        if not keep_entry:
            return deletions.entry(self._registry.decided, model_id)
        kept = tuple(a for a in model.artifacts if a.version not in versions)
        return [rules.model_edit(replace(model, artifacts=kept), "FILES_DELETED")]

    def _downloading(self, model: Model, version: int) -> bool:
        """Whether a download works on one artifact of the model (0 = on any)."""
        active = {
            o.id
            for o in self._registry.decided.operations.values()
            if o.kind in BRINGING and o.state not in FINAL_STATES
        }
        return any(a.operation in active and version in (0, a.version) for a in model.artifacts)

    def _user_of(self, model_id: str, version: int) -> Instance | None:
        """Return the instance that uses one artifact of the model (0 = any)."""
        instance = self._registry.decided.instance_of(model_id)
        if instance is None or version not in (0, instance.artifact_version):
            return None
        return instance


def stale_instance(state: State, old: Model, new: Model) -> Sequence[Edit]:
    """Return the edits that mark a loaded instance whose config has changed in what needs a reload."""
    instance = state.instance_of(new.id)
    if instance is None or not rules.needs_reload(old.config, new.config):
        return ()
    key = instance_key(instance.model, instance.id)
    return [Edit(Kind.INSTANCE, key, replace(instance, config_stale=True), "CONFIG_STALE")]
