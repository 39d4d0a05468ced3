"""The repository calls of the protocol: models listed, loaded and unloaded as Triton's clients know it."""

from collections.abc import Mapping

from modelhost.oip import open_inference_pb2
from modelhostd.api import oip_answers
from modelhostd.api.calls import Call
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.names import ID
from modelhostd.core.operations import raised
from modelhostd.core.resources import Model, Operation, OperationState
from modelhostd.host import Host

_oip = open_inference_pb2


class Repository:
    """Load and unload answer when they are done: clients take the answer for that."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def repository_index(
        self, request: _oip.RepositoryIndexRequest, call: Call
    ) -> _oip.RepositoryIndexResponse:
        """List the registered models."""
        _check_repository(request.repository_name)
        return oip_answers.index(self._host, ready_only=request.ready)

    async def repository_model_load(
        self, request: _oip.RepositoryModelLoadRequest, call: Call
    ) -> _oip.RepositoryModelLoadResponse:
        """Load a model; answers when it is loaded."""
        _check_repository(request.repository_name)
        _check_load_parameters(request.parameters)
        model = self._registered(request.model_name)
        try:
            await self._finished(
                await self._host.residency.load(model.id, principal=call.principal), call
            )
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

    def _registered(self, name: str) -> Model:
        try:
            return self._host.inference.model_for(name)
        except ModelhostError as error:
            shown = name if ID.fullmatch(name) else repr(name[:64])
            raise ModelhostError(
                error.reason,
                f"failed to load '{shown}', failed to poll from model repository: no such model is "
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
            raise ModelhostError(
                Reason.DEADLINE_EXCEEDED,
                f"operations/{operation.id} goes on beyond the call's deadline; look at its state",
                {"method": call.method.rpartition("/")[2]},
            )


def _check_repository(name: str) -> None:
    if name:
        raise invalid("repository_name", "nothing: 'repository_name' is not supported", name)


def _check_load_parameters(parameters: Mapping[str, object]) -> None:
    for key in parameters:
        if key.startswith("file:"):
            raise ModelhostError(
                Reason.PERMISSION_DENIED,
                "load failed: parameter 'file:...' would have the daemon run files of a caller; "
                "register the model by its source instead",
                {"method": "RepositoryModelLoad", "right": "none"},
            )
        if key == "config":
            raise ModelhostError(
                Reason.UNIMPLEMENTED,
                "load failed: parameter 'config' is not implemented by this daemon yet; change the "
                "model's config with modelhost.v1 ModelService.UpdateModel, then load it again",
                {"method": "RepositoryModelLoad"},
            )
        raise _unknown_parameter("load", key)


def _unknown_parameter(verb: str, key: str) -> ModelhostError:
    shown = key[:64] if key.isprintable() else repr(key[:64])
    return ModelhostError(
        Reason.INVALID_ARGUMENT,
        f"unrecognized {verb} parameter '{shown}'.",
        {"field": f"parameters[{shown}]", "expected": "a known parameter", "actual": shown},
    )
