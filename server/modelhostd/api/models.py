"""ModelService: parse, one call of the host, convert."""

from collections.abc import AsyncIterator
from dataclasses import replace

from modelhost.v1 import model_service_pb2 as pb
from modelhost.v1 import models_pb2, operations_pb2, options_pb2
from modelhostd.api import convert, convert_from, convert_models, lists, masks, uploads
from modelhostd.api.addressing import model_id, plain_model_id
from modelhostd.api.calls import Call
from modelhostd.api.compatibility import Compatibility
from modelhostd.api.methods import Service
from modelhostd.core import sources, tasks
from modelhostd.core.errors import ModelhostError, invalid
from modelhostd.core.registry import LABELS_MAX, ModelSpec
from modelhostd.core.resources import ArtifactState, InstanceState, Model, ModelFile, Source
from modelhostd.core.state import State
from modelhostd.host import Host
from modelhostd.ports import SourceFacts

FILES_SHOWN_MAX = 1000


def model_service(host: Host, compatibility: Compatibility) -> Service:
    """Return the service to offer."""
    descriptor = pb.DESCRIPTOR.services_by_name["ModelService"]
    return Service(descriptor, ModelService(host, compatibility))


class ModelService:
    """The registry of models and their files."""

    def __init__(self, host: Host, compatibility: Compatibility) -> None:
        self._host = host
        self._compatibility = compatibility

    @property
    def _state(self) -> State:
        return self._host.registry.committed

    # --- registering ----------------------------------------------------------------------------

    async def create_model(self, request: pb.CreateModelRequest, call: Call) -> models_pb2.Model:
        """See CreateModel in the contract."""
        spec = convert_from.spec(request.model)
        if request.model.HasField("source"):
            # Unset is a model whose files are uploaded; empty is a mistake.
            sources.canonical(spec.source)
        model = await self._host.models.create(
            spec,
            request.model_id,
            call.principal,
            convert_from.request(call.method, request),
        )
        return convert_models.model(model)

    async def get_model(self, request: pb.GetModelRequest, call: Call) -> models_pb2.Model:
        """See GetModel in the contract."""
        return convert_models.model(self._state.model(model_id(self._state, "name", request.name)))

    async def list_models(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """See ListModels in the contract."""
        wanted = _Filter(request, self._state)
        found = [m for m in self._host.models.list() if m in wanted]
        models, token = lists.page(request, found, lambda m: m.id, convert_models.model)
        return pb.ListModelsResponse(
            models=models,
            next_page_token=token,
            sequence=self._host.registry.journal.last_sequence,
            store_id=self._host.registry.store_id,
        )

    async def update_model(self, request: pb.UpdateModelRequest, call: Call) -> models_pb2.Model:
        """See UpdateModel in the contract."""
        given = request.model
        key = model_id(self._state, "model.name", given.name)
        paths = masks.written(request.update_mask, given, convert_from.WRITABLE_MODEL)
        spec = convert_from.spec(given)

        def change(current: ModelSpec) -> ModelSpec:
            wanted = _with_source(current, spec, "source.uri" in paths)
            return convert_from.merged(current, wanted, [p for p in paths if p != "source.uri"])

        return convert_models.model(
            await self._host.models.update(key, change, given.etag, call.principal)
        )

    async def delete_model(
        self, request: pb.DeleteModelRequest, call: Call
    ) -> operations_pb2.Operation:
        """See DeleteModel in the contract."""
        asked = convert_from.request(call.method, request)
        answered = await self._host.registry.answered(asked)
        if answered is not None:
            # The model is gone by now: only the answer is left.
            return convert.operation(self._host.operations.get(answered))
        key = plain_model_id(self._state, "name", request.name)
        operation = await self._host.models.delete(
            key, force=request.force, etag=request.etag, principal=call.principal, request=asked
        )
        return convert.operation(operation)

    # --- files ----------------------------------------------------------------------------------

    async def delete_model_files(
        self, request: pb.DeleteModelFilesRequest, call: Call
    ) -> operations_pb2.Operation:
        """See DeleteModelFiles in the contract."""
        operation = await self._host.models.delete(
            plain_model_id(self._state, "model", request.model),
            force=request.force,
            keep_entry=True,
            version=_version(request.version),
            principal=call.principal,
            request=convert_from.request(call.method, request),
        )
        return convert.operation(operation)

    async def inspect_source(
        self, request: pb.InspectSourceRequest, call: Call
    ) -> pb.InspectSourceResponse:
        """See InspectSource in the contract."""
        source = convert_from.source(request.source)
        facts = await self._host.models.inspect(source, allow_unsafe=request.allow_unsafe)
        return _inspected(facts)

    async def list_model_files(
        self, request: pb.ListModelFilesRequest, call: Call
    ) -> pb.ListModelFilesResponse:
        """See ListModelFiles in the contract."""
        key = model_id(self._state, "model", request.model)
        artifact, files = await self._host.models.files(key, _version(request.version))

        def converted(file: ModelFile) -> models_pb2.ModelFile:
            path = self._host.models.local_path(key, artifact.version, file.path)
            return convert_models.model_file(file, path)

        ordered = sorted(files, key=lambda f: f.path)
        page, token = lists.page(request, ordered, lambda f: f.path, converted)
        return pb.ListModelFilesResponse(
            files=page,
            next_page_token=token,
            version=artifact.version,
            local_path=self._host.models.local_path(key, artifact.version, ""),
            sequence=self._host.registry.journal.last_sequence,
            store_id=self._host.registry.store_id,
        )

    async def download_model(
        self, request: pb.DownloadModelRequest, call: Call
    ) -> operations_pb2.Operation:
        """See DownloadModel in the contract."""
        if request.allow_unsafe:
            call.require(options_pb2.OPERATE, "allow_unsafe")
        operation = await self._host.transfers.download(
            model_id(self._state, "name", request.name),
            priority=request.priority,
            rate_limit=request.rate_limit_bytes_per_second,
            refresh=request.refresh,
            allow_unsafe=request.allow_unsafe,
            principal=call.principal,
            request=convert_from.request(call.method, request),
        )
        return convert.operation(operation)

    async def upload_model_files(
        self, requests: AsyncIterator[pb.UploadModelFilesRequest], call: Call
    ) -> pb.UploadModelFilesResponse:
        """See UploadModelFiles in the contract."""
        return await uploads.take(self._host, requests, call)

    async def verify_model(
        self, request: pb.VerifyModelRequest, call: Call
    ) -> operations_pb2.Operation:
        """See VerifyModel in the contract."""
        operation = await self._host.verification.verify(
            model_id(self._state, "name", request.name),
            _version(request.version),
            call.principal,
            convert_from.request(call.method, request),
        )
        return convert.operation(operation)

    async def check_compatibility(
        self, request: pb.CheckCompatibilityRequest, call: Call
    ) -> pb.CheckCompatibilityResponse:
        """See CheckCompatibility in the contract."""
        device = convert_from.optional_id("devices", "device", request.device)
        model = self._state.model(model_id(self._state, "model", request.model))
        return await self._compatibility.check(model, device)


class _Filter:
    """What ListModels lets pass."""

    def __init__(self, request: pb.ListModelsRequest, state: State) -> None:
        self._task = request.task
        convert_from.few("labels", request.labels, LABELS_MAX, "labels")
        self._labels = dict(request.labels)
        kind = models_pb2.Artifact.State
        self._states = {
            ArtifactState[name] for name in convert_from.enums("states", kind, request.states)
        }
        self._loaded: set[str] | None = None
        if request.loaded_only:
            ready = InstanceState.READY
            self._loaded = {i.model for i in state.instances.values() if i.state is ready}

    def __contains__(self, model: Model) -> bool:
        return (
            (not self._task or model.task == self._task)
            and (not self._states or model.state in self._states)
            and (self._loaded is None or model.id in self._loaded)
            and all(
                key in model.labels and value in ("", model.labels[key])
                for key, value in self._labels.items()
            )
        )


def _with_source(current: ModelSpec, given: ModelSpec, named: bool) -> ModelSpec:
    """Return ``given`` with its source canonical; another place than the present one is refused."""
    if not given.source.uri:
        own = current.source
        return replace(given, source=replace(given.source, uri=own.uri, more_uris=own.more_uris))
    source = sources.parse_source(
        given.source.uri,
        revision=given.source.revision,
        allow_patterns=given.source.allow_patterns,
        ignore_patterns=given.source.ignore_patterns,
        more_uris=given.source.more_uris,
        field="model.source.uri",
    )
    places = [(one.uri, one.more_uris) for one in (source, current.source)]
    if named and places[0] != places[1]:
        expected = f"the model's own, {current.source.uri}; register another model for another one"
        raise invalid("model.source.uri", expected, given.source.uri)
    return replace(given, source=source)


def _version(version: int) -> int:
    if version < 0:
        raise invalid("version", "0 (the current one) or a version of the model", version)
    return version


def _inspected(facts: SourceFacts) -> pb.InspectSourceResponse:
    files = sorted(facts.files, key=lambda f: f.path)
    return pb.InspectSourceResponse(
        source=convert_models.source(facts.source),
        revision=facts.revision,
        model_id=_derived(facts.source),
        task=tasks.task_of(facts.task, facts.tags),
        source_task=facts.task,
        licence=facts.licence,
        tags=facts.tags,
        gated=facts.gated,
        private=facts.private,
        files=[
            pb.InspectSourceResponse.File(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256)
            for f in files[:FILES_SHOWN_MAX]
        ],
        file_count=len(files),
        size_bytes=sum(f.size_bytes for f in files),
        skipped_files=[
            pb.InspectSourceResponse.SkippedFile(path=path, message=why)
            for path, why in sorted(facts.skipped)[:FILES_SHOWN_MAX]
        ],
        predicted_bytes=facts.predicted_bytes,
    )


def _derived(source: Source) -> str:
    """Return the id CreateModel would derive; empty where it would ask for one."""
    try:
        return sources.derive_model_id(source)
    except ModelhostError:
        return ""
