"""Reloads: a model's instance replaced by one of another artifact, or of the present config.

Requests wait meanwhile and none is refused: the new load is wanted in the same step that takes the old
instance out of service. Where that load fails, what served before is loaded again.
"""

from collections.abc import Sequence
from functools import partial

from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.residency import Refuse
from modelhostd.core.resources import FINAL_STATES, Model, Operation, OperationKind, Phase
from modelhostd.core.state import Edit
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.host.residency import Residency


class Reloads:
    """Begins reloads; Residency carries them out as it does any drain and load."""

    def __init__(self, registry: Registry, operations: Operations, residency: Residency) -> None:
        self._registry = registry
        self._operations = operations
        self._residency = residency

    async def reload(
        self,
        model_id: str,
        *,
        version: int = 0,
        principal: str = "",
        request: Request | None = None,
    ) -> Operation:
        """Return the operation that brings the model to READY anew; 0 takes the newest version.

        Another version is a rollback: it is what loads take until the next reload, also over a
        restart. Raises MODEL_NOT_DOWNLOADED, MODEL_BLOCKED, MODEL_TOO_LARGE, OUT_OF_DEVICE_MEMORY and
        CONFLICTING_OPERATION at once; the old instance then stays in service.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        model = self._registry.decided.model(model_id)
        chosen = rules.choose_version(model, version)
        plan, _ = self._residency.loads.plan_model(chosen)
        if isinstance(plan, Refuse):
            raise plan.error
        joined = self._joinable(chosen, model)
        if joined is not None:
            await self._registry.stage((), principal, request, joined)
            return self._operations.get(joined)
        edits: Sequence[Edit] = ()
        if chosen != model:
            edits = [rules.model_edit(chosen, "VERSION_CHOSEN", version=str(version))]
        operation, _, done = self._operations.begin(
            OperationKind.RELOAD,
            model=model_id,
            join_key=f"reload:{model_id}",
            join=False,
            principal=principal,
            request=request,
            edits=lambda _: edits,
            begun=partial(self._carry_out, model_id),
        )
        await done
        return self._operations.get(operation.id)

    def _joinable(self, chosen: Model, model: Model) -> str | None:
        """Return a reload that has not begun to load yet: it will take what this one wants."""
        wanted = self._residency.loads.get(model.id)
        if chosen != model or wanted is None or wanted.task is not None:
            return None
        for key in wanted.operations:
            found = self._registry.decided.operations.get(key)
            unfinished = found is not None and found.state not in FINAL_STATES
            if found is not None and unfinished and found.kind is OperationKind.RELOAD:
                return key
        return None

    def _carry_out(self, model_id: str, operation: Operation) -> None:
        loads = self._residency.loads
        self._registry.record(self._operations.running(operation.id, Phase.DRAINING))
        try:
            wanted = loads.get(model_id)
            if wanted is not None and wanted.task is not None and self._outdated(model_id):
                loads.restart(model_id)
            route = self._residency.routes.get(model_id)
            before = loads.loaded(route) if route is not None and route.open else None
            if route is not None and route.open:
                self._residency.drain(route, "RELOADED", {})
            self._residency.drop(model_id, "RELOADED", {})
            loads.want_for(model_id, operation.id, before=before)
        except ModelhostError as error:
            # What it needs has gone between the decision and its commit.
            self._registry.record(self._operations.failed(operation.id, error))

    def _outdated(self, model_id: str) -> bool:
        """Whether what loads now is not what a load would take that began now."""
        instance = self._registry.decided.instance_of(model_id)
        artifact = self._registry.decided.model(model_id).available
        if instance is None or artifact is None:
            return False
        return instance.config_stale or instance.artifact_version != artifact.version
