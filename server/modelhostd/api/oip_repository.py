"""The repository calls of the protocol: models listed, loaded and unloaded as Triton's clients know it."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import structlog

from modelhost.oip import model_config_pb2, open_inference_pb2
from modelhostd.api import convert_from, oip_answers, oip_config
from modelhostd.api.calls import Call
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.names import shown
from modelhostd.core.operations import raised
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import Model, Operation, OperationState
from modelhostd.host import Host
from modelhostd.host.arrivals import no_version
from modelhostd.host.routes import Route
from modelhostd.ports import Loaded

log = structlog.get_logger(__name__)

_oip = open_inference_pb2

_OF_CONFIG = (
    *(Reason.BACKEND_NOT_AVAILABLE, Reason.UNSUPPORTED_MODEL),
    *(Reason.LOAD_FAILED, Reason.MODEL_TOO_LARGE),
)
"""Why a load failed that would fail again with the same config."""

FILES_REFUSED = (
    "a parameter 'file:...' would have the daemon run files of a caller; register the model by its "
    "source instead"
)


class Repository:
    """Load and unload answer when they are done: clients take the answer for that."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loads: set[asyncio.Task[None]] = set()
        """Loads with a config: each goes on when its caller has gone, so that a config that fails is taken back."""

    async def repository_index(
        self, request: _oip.RepositoryIndexRequest, call: Call
    ) -> _oip.RepositoryIndexResponse:
        """List the registered models."""
        _check_repository(request.repository_name)
        return oip_answers.index(self._host, ready_only=request.ready)

    async def repository_model_load(
        self, request: _oip.RepositoryModelLoadRequest, call: Call
    ) -> _oip.RepositoryModelLoadResponse:
        """Load a model, with another config if one is given; answers when it is loaded.

        A config with which the model cannot be loaded is taken back, also where the caller has gone by then.
        """
        _check_repository(request.repository_name)
        _check_load_parameters(request.parameters)
        model = self._registered(request.model_name)
        try:
            if "config" in request.parameters:
                await self._load_with(request, model, call)
            else:
                load = self._host.residency.load
                await self._finished(await load(model.id, principal=call.principal), call)
        except ModelhostError as error:
            if error.reason is Reason.SHUTTING_DOWN:
                raise
            raise ModelhostError(
                error.reason,
                f"load failed for model '{request.model_name}': {error.message}",
                error.metadata,
                error.retry_delay_s,
            ) from error
        return _oip.RepositoryModelLoadResponse()

    async def repository_model_unload(
        self, request: _oip.RepositoryModelUnloadRequest, call: Call
    ) -> _oip.RepositoryModelUnloadResponse:
        """Unload a model; answers when its memory is free."""
        _check_repository(request.repository_name)
        for key in request.parameters:
            if key != "unload_dependents":
                raise _unknown_parameter("unload", key)
        model = self._host.inference.model_for(request.model_name)
        await self._finished(
            await self._host.residency.unload(model.id, principal=call.principal), call
        )
        return _oip.RepositoryModelUnloadResponse()

    async def loaded(self, name: str, version: str, call: Call) -> tuple[Route, Loaded]:
        """Return a model's route and what its worker says of it; loads the model where that is allowed.

        Only a loaded model knows its inputs, and clients ask for them before their first request.
        """
        work = self._host.inference.loaded_route(name, call.remaining_s())
        route = await call.or_shutdown(work)
        if version not in ("", str(route.version)):
            raise no_version(name, version, route.version)
        assert route.loaded is not None, name
        return route, route.loaded

    async def config(self, name: str, version: str, call: Call) -> model_config_pb2.ModelConfig:
        """Return a model's configuration as Triton's clients know it, loading it as a request would."""
        route, loaded = await self.loaded(name, version, call)
        device = self._host.registry.committed.devices.get(route.device)
        return oip_answers.config(name, route, loaded, device)

    async def _load_with(
        self, request: _oip.RepositoryModelLoadRequest, model: Model, call: Call
    ) -> None:
        """Change a model's config and load it with that; the caller may go, which ends neither."""
        change = oip_config.read(request.parameters["config"].string_param)
        if change.as_is_names:
            change.check(await self.config(request.model_name, "", call))
        work = asyncio.create_task(self._reconfigure(change, model, call.principal))
        self._loads.add(work)
        work.add_done_callback(self._loaded_with)
        try:
            async with asyncio.timeout(call.remaining_s()):
                await call.or_shutdown(asyncio.shield(work))
        except TimeoutError:
            raise _goes_on(f"the load of '{model.id}'", call) from None

    def _loaded_with(self, work: "asyncio.Task[None]") -> None:
        self._loads.discard(work)
        # Its caller may have gone: nobody else would tell of what was not foreseen.
        error = None if work.cancelled() else work.exception()
        if error is not None and not isinstance(error, ModelhostError):
            log.error("a load with a config failed unexpectedly", exc_info=error)

    async def _reconfigure(
        self, change: oip_config.ConfigChange, model: Model, principal: str
    ) -> None:
        was_loaded = self._host.routes.get(model.id) is not None
        changed = await self._configured(change, model, principal)
        instance = self._host.registry.committed.instance_of(model.id)
        stale = instance is not None and instance.config_stale
        load = self._host.reloads.reload if stale else self._host.residency.load
        try:
            operation = await load(model.id, principal=principal)
            done = await self._host.operations.wait(operation.id, None)
            if done.error is not None:
                raise raised(done.error)
            if done.state is not OperationState.SUCCEEDED:
                why = f"operations/{operation.id} was cancelled"
                raise ModelhostError(Reason.CANCELLED, why, {"operation": operation.id})
        except ModelhostError as error:
            if error.reason in _OF_CONFIG and changed.config != model.config:
                await self._taken_back(model, changed, principal, load=was_loaded)
            raise

    async def _configured(
        self, change: oip_config.ConfigChange, model: Model, principal: str
    ) -> Model:
        """Change a model's config; returns the model after it."""
        paths = [f"config.{name}" for name in change.names]

        def changed(current: ModelSpec) -> ModelSpec:
            return convert_from.merged(current, replace(current, config=config), paths)

        with change.named_as_sent():
            config = convert_from.config(change.config)
            return await self._host.models.update(model.id, changed, "", principal)

    async def _taken_back(
        self, before: Model, changed: Model, principal: str, *, load: bool
    ) -> None:
        """Give a model its config again, unless somebody has changed it since, and begin to load it with that."""

        def again(current: ModelSpec) -> ModelSpec:
            same = current.config == changed.config
            return replace(current, config=before.config) if same else current

        with suppress(ModelhostError):
            await self._host.models.update(before.id, again, "", principal)
            if load:
                await self._host.residency.load(before.id, principal=principal)

    def _registered(self, name: str) -> Model:
        try:
            return self._host.inference.model_for(name)
        except ModelhostError as error:
            raise ModelhostError(
                error.reason,
                f"failed to load '{shown(name)}', failed to poll from model repository: no such model is "
                f"registered; `modelhost pull` adds one",
                error.metadata,
            ) from None

    async def _finished(self, operation: Operation, call: Call) -> None:
        """Wait until an operation has ended, and raise its error if it has one."""
        work = self._host.operations.wait(operation.id, call.remaining_s())
        done = await call.or_shutdown(work)
        if done.error is not None:
            raise raised(done.error)
        if done.state is not OperationState.SUCCEEDED:
            raise _goes_on(f"operations/{operation.id}", call)


def _goes_on(work: str, call: Call) -> ModelhostError:
    return ModelhostError(
        Reason.DEADLINE_EXCEEDED,
        f"{work} goes on beyond the call's deadline; look at its state",
        {"method": call.method.rpartition("/")[2]},
    )


def _check_repository(name: str) -> None:
    if name:
        raise invalid("repository_name", "nothing: 'repository_name' is not supported", name)


def _check_load_parameters(parameters: Mapping[str, _oip.ModelRepositoryParameter]) -> None:
    # Files first: clients send a config with them.
    for key, value in sorted(parameters.items(), key=lambda item: not item[0].startswith("file:")):
        if key.startswith("file:"):
            raise ModelhostError(
                Reason.PERMISSION_DENIED,
                f"load failed: {FILES_REFUSED}",
                {"method": "RepositoryModelLoad", "right": "none"},
            )
        if key != "config":
            raise _unknown_parameter("load", key)
        kind = value.WhichOneof("parameter_choice")
        if kind != "string_param":
            raise invalid("parameters[config]", "string_param: a JSON object", kind or "nothing")


def _unknown_parameter(verb: str, key: str) -> ModelhostError:
    given = shown(key)
    return ModelhostError(
        Reason.INVALID_ARGUMENT,
        f"unrecognized {verb} parameter '{given}'.",
        {"field": f"parameters[{given}]", "expected": "a known parameter", "actual": given},
    )
