# Made from modelhost/_async/residency.py by generate_sync.py: do not edit, change that.
"""Residency: what is in memory, and changing it."""

from collections.abc import Iterable

from modelhost import _enums, _names
from modelhost._progress import Report
from modelhost._sync.operations import PAGE_SIZE, OperationHandle, Operations
from modelhost.v1 import instances_pb2, models_pb2, residency_service_pb2


class Residency(Operations):
    """What ``Client`` does with loaded models."""

    def load(
        self,
        model: str,
        *,
        device: str | None = None,
        priority: int = 0,
        download: bool = False,
        wait: bool = True,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> OperationHandle:
        """Load a model; at its end the operation has ``load_result``. READY already is no error.

        ``device`` None = as the model's config says; ``priority`` from -100 to 100, the higher first, 0 =
        the config's; a load that runs already is joined, and gets it. ``download`` fetches absent files
        first. How it is loaded is the model's config.

        Raises OutOfMemory with the numbers, NotFound, PreconditionFailed, Timeout.
        """
        request = residency_service_pb2.LoadModelRequest(
            name=_names.model_name(model),
            device=_names.device_name(device),
            priority=priority,
            download=download,
        )
        operation = self._transport.unary(self._transport.residency.LoadModel, request)
        operation = self._as_asked(operation, priority)
        return self._handle(operation, wait=wait, progress=progress, timeout=timeout)

    def unload(
        self,
        model: str,
        *,
        keep_warm: bool = False,
        force: bool = False,
        wait: bool = True,
        timeout: float | None = None,
    ) -> OperationHandle:
        """Unload a model once what is in flight has ended; at the operation's end the memory is free.

        ``keep_warm`` leaves its weights in host memory; ``force`` cancels what is in flight.
        """
        request = residency_service_pb2.UnloadModelRequest(
            name=_names.model_name(model), keep_warm=keep_warm, force=force
        )
        operation = self._transport.unary(self._transport.residency.UnloadModel, request)
        return self._handle(operation, wait=wait, timeout=timeout)

    def reload(
        self,
        model: str,
        *,
        version: int = 0,
        wait: bool = True,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> OperationHandle:
        """Replace a model's instance by one of its newest files, or of ``version``, and present config."""
        request = residency_service_pb2.ReloadModelRequest(
            name=_names.model_name(model), version=version
        )
        operation = self._transport.unary(self._transport.residency.ReloadModel, request)
        return self._handle(operation, wait=wait, progress=progress, timeout=timeout)

    def plan(self, model: str, device: str | None = None) -> residency_service_pb2.PlanLoadResponse:
        """Say what ``load`` would do now: where to and who would go, or why not. Does nothing."""
        request = residency_service_pb2.PlanLoadRequest(
            model=_names.model_name(model), device=_names.device_name(device)
        )
        return self._transport.unary(self._transport.residency.PlanLoad, request)

    def instances(
        self,
        model: str | None = None,
        *,
        device: str | None = None,
        states: Iterable[str] = (),
    ) -> list[instances_pb2.Instance]:
        """List what is loaded, warm or loading, with its activity; ``states`` are names (``READY``)."""
        request = residency_service_pb2.ListInstancesRequest(
            model=_names.model_name(model) if model else "",
            page_size=PAGE_SIZE,
            device=_names.device_name(device),
            states=[
                _enums.number_of(instances_pb2.Instance.State, state, "states") for state in states
            ],
        )
        found: list[instances_pb2.Instance] = []
        while True:
            page = self._transport.unary(self._transport.residency.ListInstances, request)
            found.extend(page.instances)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def instance(self, model: str) -> instances_pb2.Instance:
        """Return a model's instance. Raises NotFound where it has none."""
        request = residency_service_pb2.GetInstanceRequest(name=_names.instance_name(model))
        return self._transport.unary(self._transport.residency.GetInstance, request)

    def check_instance(self, model: str, timeout: float | None = None) -> instances_pb2.Instance:
        """Run the health check of a model's instance now; ``health`` of the answer is the verdict."""
        request = residency_service_pb2.CheckInstanceRequest(name=_names.instance_name(model))
        return self._transport.unary(self._transport.residency.CheckInstance, request, timeout)

    def pin(self, model: str) -> models_pb2.Model:
        """Forbid a model's eviction, without end; it is not loaded by that. Needs the operator's right."""
        request = residency_service_pb2.PinModelRequest(name=_names.model_name(model))
        return self._transport.unary(self._transport.residency.PinModel, request)

    def unpin(self, model: str) -> models_pb2.Model:
        """Allow a model's eviction again. Needs the operator's right."""
        request = residency_service_pb2.UnpinModelRequest(name=_names.model_name(model))
        return self._transport.unary(self._transport.residency.UnpinModel, request)

    def unblock(self, model: str) -> models_pb2.Model:
        """Allow another try of a model that crashed too often; it is not loaded by that."""
        request = residency_service_pb2.UnblockModelRequest(name=_names.model_name(model))
        return self._transport.unary(self._transport.residency.UnblockModel, request)
