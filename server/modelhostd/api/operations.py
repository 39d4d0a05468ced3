"""OperationService: parse, one call of the host, convert."""

from collections.abc import AsyncIterator
from contextlib import aclosing

from modelhost.v1 import operation_service_pb2 as pb
from modelhost.v1 import operations_pb2
from modelhostd.api import convert, convert_from, lists, masks
from modelhostd.api.admission import Group
from modelhostd.api.calls import Call
from modelhostd.api.methods import Service
from modelhostd.core import names
from modelhostd.core.errors import invalid
from modelhostd.core.resources import (
    FINAL_STATES,
    Operation,
    OperationKind,
    OperationState,
)
from modelhostd.host import Host

WAIT_MAX_S = 600.0
FILES_MAX = 1000
"""Files shown of one download: an answer has its bounds."""
ANSWER_MARGIN_S = 0.25
"""How long before the call's own deadline WaitOperation answers with what there is."""

WRITABLE = ("priority", "rate_limit_bytes_per_second")
_TIME_DIGITS = 20


def operation_service(host: Host) -> Service:
    """Return the service to offer."""
    descriptor = pb.DESCRIPTOR.services_by_name["OperationService"]
    return Service(
        descriptor,
        OperationService(host),
        # It lasts as a stream does, and must not take the places of short calls.
        groups={"WaitOperation": Group.STREAM},
        timeouts={"WaitOperation": None},
    )


class OperationService:
    """Long work: look, steer, wait, watch."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def get_operation(
        self, request: pb.GetOperationRequest, call: Call
    ) -> operations_pb2.Operation:
        """See GetOperation in the contract."""
        return self._shown(self._host.operations.get(_key(request.name)), request.include_files)

    async def list_operations(
        self, request: pb.ListOperationsRequest, call: Call
    ) -> pb.ListOperationsResponse:
        """See ListOperations in the contract."""
        model = convert_from.optional_id("models", "model", request.model)
        kinds = {
            OperationKind[name]
            for name in convert_from.enums("kinds", operations_pb2.Operation.Kind, request.kinds)
        }
        states = {
            OperationState[name]
            for name in convert_from.enums("states", operations_pb2.Operation.State, request.states)
        }
        found = [
            o
            for o in self._host.registry.committed.operations.values()
            if model in ("", o.model)
            and (not kinds or o.kind in kinds)
            and (not states or o.state in states)
        ]
        operations, token = lists.page(
            request,
            sorted(found, key=_newest_first),
            _newest_first,
            lambda o: convert.operation(self._host.operations.live(o)),
        )
        return pb.ListOperationsResponse(
            operations=operations,
            next_page_token=token,
            sequence=self._host.registry.journal.last_sequence,
            store_id=self._host.registry.store_id,
        )

    async def update_operation(
        self, request: pb.UpdateOperationRequest, call: Call
    ) -> operations_pb2.Operation:
        """See UpdateOperation in the contract."""
        key = _key(request.operation.name, "operation.name")
        paths = masks.written(request.update_mask, request.operation, WRITABLE)
        given = request.operation
        if not paths:
            return convert.operation(self._host.operations.get(key))
        rate = given.rate_limit_bytes_per_second
        updated = await self._host.update_operation(
            key,
            priority=given.priority if "priority" in paths else None,
            rate_limit=rate if "rate_limit_bytes_per_second" in paths else None,
        )
        return convert.operation(updated)

    async def cancel_operation(
        self, request: pb.CancelOperationRequest, call: Call
    ) -> operations_pb2.Operation:
        """See CancelOperation in the contract."""
        return convert.operation(await self._host.operations.cancel(_key(request.name)))

    async def pause_operation(
        self, request: pb.PauseOperationRequest, call: Call
    ) -> operations_pb2.Operation:
        """See PauseOperation in the contract."""
        key = _key(request.name)
        operation = self._host.operations.get(key)
        if operation.state is OperationState.PAUSED:
            return convert.operation(operation)
        return convert.operation(await self._host.transfers.pause(key))

    async def resume_operation(
        self, request: pb.ResumeOperationRequest, call: Call
    ) -> operations_pb2.Operation:
        """See ResumeOperation in the contract."""
        key = _key(request.name)
        operation = self._host.operations.get(key)
        waiting = operation.state in (OperationState.QUEUED, OperationState.RUNNING)
        if waiting:
            return convert.operation(operation)
        return convert.operation(await self._host.transfers.resume(key))

    async def wait_operation(
        self, request: pb.WaitOperationRequest, call: Call
    ) -> operations_pb2.Operation:
        """See WaitOperation in the contract."""
        key = _key(request.name)
        timeout = WAIT_MAX_S
        if request.HasField("timeout"):
            asked = convert_from.seconds("timeout", request.timeout)
            if asked < 0:
                raise invalid("timeout", "0 s or more", f"{asked:g} s")
            timeout = min(timeout, asked)
        remaining = call.remaining_s()
        if remaining is not None:
            timeout = min(timeout, max(0.0, remaining - ANSWER_MARGIN_S))
        operation = self._host.operations.get(key)
        if timeout and operation.state not in FINAL_STATES:
            operation = await call.or_shutdown(self._host.operations.wait(key, timeout))
        return convert.operation(operation)

    async def watch_operation(
        self, request: pb.WatchOperationRequest, call: Call
    ) -> AsyncIterator[operations_pb2.Operation]:
        """See WatchOperation in the contract."""
        key = _key(request.name)
        self._host.operations.get(key)
        async with aclosing(call.until_shutdown(self._host.operations.watch(key))) as states:
            async for operation in states:
                yield self._shown(operation, request.include_files)

    def _shown(self, operation: Operation, include_files: bool) -> operations_pb2.Operation:
        files = self._host.transfers.files(operation.id) if include_files else ()
        return convert.operation(operation, files[:FILES_MAX])


def _key(name: str, field: str = "name") -> str:
    return names.parse("operations", field, name)


def _newest_first(operation: Operation) -> str:
    """Return a key that sorts operations newest first."""
    age = 10**_TIME_DIGITS - int(operation.create_time * 1e6)
    return f"{age:0{_TIME_DIGITS}d}/{operation.id}"
