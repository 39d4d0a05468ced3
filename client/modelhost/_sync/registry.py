# Made from modelhost/_async/registry.py by generate_sync.py: do not edit, change that.
"""The registry: models, their files, and where these come from."""

from collections.abc import Iterable, Mapping
from typing import Any

from modelhost import _enums, _masks, _names, _sources
from modelhost._errors import AlreadyExists, invalid
from modelhost._progress import Report
from modelhost._sync.operations import PAGE_SIZE, OperationHandle, Operations
from modelhost.v1 import model_service_pb2, models_pb2


class Registry(Operations):
    """What ``Client`` does with models and their files."""

    def pull(
        self,
        source: str,
        name: str | None = None,
        *,
        task: str = "",
        revision: str = "",
        more_uris: Iterable[str] = (),
        allow_patterns: Iterable[str] = (),
        ignore_patterns: Iterable[str] = (),
        priority: int = 0,
        rate_limit_bytes_per_second: int = 0,
        allow_unsafe: bool = False,
        refresh: bool = False,
        wait: bool = True,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> OperationHandle:
        """Bring a model's files to the host's disk, and register it first where it is not yet.

        ``source`` is a URI (``hf://org/name@revision``) or the id of a model that is registered; ``name``
        the id it is to have, by default the source's last segment in lower case. A model of the same id
        and source is no error: what is on disk already is not fetched again, and its source is asked for
        a newer revision only with ``refresh``. ``task`` becomes that of a registered model, too. The
        patterns belong to the model: one that is registered with others is AlreadyExists. ``revision``
        may stand behind the URI instead (``hf://org/name@revision``); ``more_uris`` are further files
        of the same model where ``source`` is the URL of one file. A download that runs already is
        joined, and gets ``priority`` and the rate limit where these are given.

        Returns the operation, at its end unless ``wait`` is False; ``progress`` and ``timeout`` are
        those of ``OperationHandle.result``. A caller that goes away stops nothing. Raises
        AlreadyExists where the id belongs to another source, and what the download failed with.
        """
        model = _names.model_name(source)
        if _sources.is_source(source):
            place = _sources.make(source, revision, more_uris, allow_patterns, ignore_patterns)
            model = self._registered(place, name, task)
        elif "/" in source.removeprefix("models/"):
            raise invalid(
                "source", f"a URI (hf://{source} for the Hub) or a model's id", repr(source)
            )
        elif what := _of_new_ones(name, revision, more_uris, allow_patterns, ignore_patterns):
            raise invalid(what, "none for a model that is registered", repr(source))
        elif task:
            self.update(model, {"task": task})
        request = model_service_pb2.DownloadModelRequest(
            name=model,
            priority=priority,
            rate_limit_bytes_per_second=rate_limit_bytes_per_second,
            allow_unsafe=allow_unsafe,
            refresh=refresh,
        )
        operation = self._transport.unary(self._transport.models.DownloadModel, request)
        operation = self._as_asked(operation, priority, rate_limit_bytes_per_second)
        return self._handle(operation, wait=wait, progress=progress, timeout=timeout)

    def add(
        self,
        source: str | None,
        name: str | None = None,
        *,
        display_name: str = "",
        description: str = "",
        labels: Mapping[str, str] | None = None,
        licence: str = "",
        task: str = "",
        config: models_pb2.ModelConfig | Mapping[str, Any] | None = None,
        requirements: models_pb2.Requirements | Mapping[str, Any] | None = None,
        base_model: str = "",
        revision: str = "",
        more_uris: Iterable[str] = (),
        allow_patterns: Iterable[str] = (),
        ignore_patterns: Iterable[str] = (),
    ) -> models_pb2.Model:
        """Register a model and fetch nothing. ``source`` None = its files will be uploaded.

        ``revision``, ``more_uris`` and the patterns are those of ``pull``.

        Raises AlreadyExists where a model or a slot has the id, InvalidArgument, PreconditionFailed
        where the host's policy forbids the source.
        """
        model = models_pb2.Model(
            display_name=display_name,
            description=description,
            labels=labels,
            licence=licence,
            task=task,
            base_model=_names.model_name(base_model) if base_model else "",
        )
        if source is not None:
            model.source.CopyFrom(
                _sources.make(source, revision, more_uris, allow_patterns, ignore_patterns)
            )
        if config is not None:
            model.config.CopyFrom(_masks.as_message(models_pb2.ModelConfig, config, "config"))
        if requirements is not None:
            model.requirements.CopyFrom(
                _masks.as_message(models_pb2.Requirements, requirements, "requirements")
            )
        request = model_service_pb2.CreateModelRequest(model=model, model_id=name or "")
        return self._transport.unary(self._transport.models.CreateModel, request)

    def models(
        self,
        *,
        task: str = "",
        states: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        loaded_only: bool = False,
    ) -> list[models_pb2.Model]:
        """List models by name, those that pass every filter.

        ``states`` are names of the contract (``AVAILABLE``); an empty value in ``labels`` = any.
        """
        request = model_service_pb2.ListModelsRequest(
            page_size=PAGE_SIZE,
            task=task,
            states=[
                _enums.number_of(models_pb2.Artifact.State, state, "states") for state in states
            ],
            labels=labels,
            loaded_only=loaded_only,
        )
        found: list[models_pb2.Model] = []
        while True:
            page = self._transport.unary(self._transport.models.ListModels, request)
            found.extend(page.models)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def get(self, model: str) -> models_pb2.Model:
        """Return one model, by id, name or slot. Raises NotFound."""
        request = model_service_pb2.GetModelRequest(name=_names.model_name(model))
        return self._transport.unary(self._transport.models.GetModel, request)

    def update(self, model: str, changes: Mapping[str, Any], *, etag: str = "") -> models_pb2.Model:
        """Change what ``changes`` names, all of it or, on an error, nothing; return the model after it.

        Keys are paths of the contract, None clears::

            client.update("e5", {"description": "...", "config.keep_alive": timedelta(minutes=5)})

        Raises NotFound, InvalidArgument, and Conflict where ``etag`` is given and not current.
        """
        changed = models_pb2.Model(name=_names.model_name(model), etag=etag)
        mask = _masks.fill(changed, changes)
        request = model_service_pb2.UpdateModelRequest(model=changed, update_mask=mask)
        return self._transport.unary(self._transport.models.UpdateModel, request)

    def delete(
        self,
        model: str,
        *,
        force: bool = False,
        etag: str = "",
        wait: bool = True,
        timeout: float | None = None,
    ) -> OperationHandle:
        """Delete a model and its files. Raises NotFound; PreconditionFailed where it is loaded.

        ``force`` unloads it first, and cancels its download.
        """
        request = model_service_pb2.DeleteModelRequest(
            name=_names.model_name(model), force=force, etag=etag
        )
        operation = self._transport.unary(self._transport.models.DeleteModel, request)
        return self._handle(operation, wait=wait, timeout=timeout)

    def delete_files(
        self,
        model: str,
        *,
        version: int = 0,
        force: bool = False,
        wait: bool = True,
        timeout: float | None = None,
    ) -> OperationHandle:
        """Delete a model's files and keep its entry; ``version`` 0 = of all versions."""
        request = model_service_pb2.DeleteModelFilesRequest(
            model=_names.model_name(model), version=version, force=force
        )
        operation = self._transport.unary(self._transport.models.DeleteModelFiles, request)
        return self._handle(operation, wait=wait, timeout=timeout)

    def verify(
        self,
        model: str,
        *,
        version: int = 0,
        wait: bool = True,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> OperationHandle:
        """Hash a model's files again; ``operation.verify_result`` lists what is wrong.

        An artifact with a wrong file is QUARANTINED then; the next ``pull`` fetches it again.
        """
        request = model_service_pb2.VerifyModelRequest(
            name=_names.model_name(model), version=version
        )
        operation = self._transport.unary(self._transport.models.VerifyModel, request)
        return self._handle(operation, wait=wait, progress=progress, timeout=timeout)

    def files(self, model: str, *, version: int = 0) -> list[models_pb2.ModelFile]:
        """List a model's files with their paths on the host's disk; ``version`` 0 = the current one."""
        request = model_service_pb2.ListModelFilesRequest(
            model=_names.model_name(model), version=version, page_size=PAGE_SIZE
        )
        found: list[models_pb2.ModelFile] = []
        while True:
            page = self._transport.unary(self._transport.models.ListModelFiles, request)
            found.extend(page.files)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def inspect(
        self,
        source: str,
        *,
        revision: str = "",
        more_uris: Iterable[str] = (),
        allow_patterns: Iterable[str] = (),
        ignore_patterns: Iterable[str] = (),
        allow_unsafe: bool = False,
        timeout: float | None = None,
    ) -> model_service_pb2.InspectSourceResponse:
        """Ask a source what a pull would fetch, and fetch nothing of it."""
        request = model_service_pb2.InspectSourceRequest(
            source=_sources.make(source, revision, more_uris, allow_patterns, ignore_patterns),
            allow_unsafe=allow_unsafe,
        )
        return self._transport.unary(self._transport.models.InspectSource, request, timeout)

    def check_compatibility(
        self, model: str, device: str | None = None
    ) -> model_service_pb2.CheckCompatibilityResponse:
        """Tell whether a model can work on this host, check by check and with numbers."""
        request = model_service_pb2.CheckCompatibilityRequest(
            model=_names.model_name(model), device=_names.device_name(device)
        )
        return self._transport.unary(self._transport.models.CheckCompatibility, request)

    def _registered(self, source: models_pb2.Source, name: str | None, task: str) -> str:
        """Return the name of the model with this source and id, which is made where there is none."""
        try:
            made = self.add(
                source.uri,
                name,
                task=task,
                revision=source.revision,
                more_uris=source.more_uris,
                allow_patterns=source.allow_patterns,
                ignore_patterns=source.ignore_patterns,
            )
        except AlreadyExists as error:
            taken = error.metadata.get("name", "")
            if not taken.startswith("models/"):
                raise
            known = self.get(taken)
            if not _sources.same_source(source, known.source):
                raise
            if not _sources.same_patterns(source, known.source):
                raise _sources.other_patterns(known, error) from None
            if task and task != known.task:
                self.update(known.name, {"task": task})
            return known.name
        return made.name


def _of_new_ones(
    name: str | None,
    revision: str,
    more_uris: Iterable[str],
    allow_patterns: Iterable[str],
    ignore_patterns: Iterable[str],
) -> str:
    """Return which argument of a pull is only for models that are not registered yet; empty = none is given."""
    given = {
        "name": name is not None,
        "revision": bool(revision),
        "more_uris": bool(more_uris),
        "allow_patterns": bool(allow_patterns),
        "ignore_patterns": bool(ignore_patterns),
    }
    return next((argument for argument, is_given in given.items() if is_given), "")
