# Made from modelhost/_async/operations.py by generate_sync.py: do not edit, change that.
"""Operations: look, steer, follow to the end."""

import time
from collections.abc import Iterable, Iterator

from modelhost import _enums, _names
from modelhost._arguments import checked
from modelhost._errors import ModelhostError, PreconditionFailed
from modelhost._follow import Follow, is_final
from modelhost._progress import Report, reporter
from modelhost._status import error_from_operation
from modelhost._sync.transport import Transport
from modelhost.v1 import operation_service_pb2, operations_pb2

PAGE_SIZE = 1000

Operation = operations_pb2.Operation


@checked
class OperationHandle:
    """One operation of the daemon: iterate over it for its progress, or wait for its ``result``.

    It belongs to the daemon: dropping the handle stops nothing, ``cancel`` does. Iterating yields the
    operation as it is now, then each change and at most 4 samples of progress a second, and ends behind
    the final state; it goes on by itself when the connection breaks or the daemon restarts.
    """

    def __init__(self, transport: Transport, operation: Operation) -> None:
        self._transport = transport
        self._operation = operation

    def __repr__(self) -> str:
        state = _enums.name_of(Operation.State, self._operation.state)
        return f"<{type(self).__name__} {self.name} {state}>"

    @property
    def operation(self) -> Operation:
        """The operation as it was last seen."""
        return self._operation

    @property
    def name(self) -> str:
        """The resource name, ``operations/{operation}``."""
        return self._operation.name

    @property
    def model(self) -> str:
        """The model it works on, ``models/{model}``; empty for work on the whole host."""
        return self._operation.model

    @property
    def done(self) -> bool:
        """Whether it had ended, well or badly, when it was last seen."""
        return is_final(self._operation)

    def refresh(self, *, include_files: bool = False) -> Operation:
        """Ask for the operation as it is now; ``include_files`` = with how far each file is."""
        request = operation_service_pb2.GetOperationRequest(
            name=self.name, include_files=include_files
        )
        self._operation = self._transport.unary(self._transport.operations.GetOperation, request)
        return self._operation

    def result(
        self, timeout: float | None = None, *, progress: Report | bool | None = None
    ) -> Operation:
        """Wait for the end and return the operation, which has the result of its kind.

        ``timeout`` is in seconds, None = no end; Timeout is raised when it has passed, and the operation
        goes on. ``progress``: a callable gets each state; True shows them on stderr. Raises what the
        operation failed with, as the same failure of a call would be; Cancelled where it was cancelled.
        """
        with reporter(progress) as report:
            for operation in self._steps(timeout, include_files=bool(progress)):
                report(operation)
        error = error_from_operation(self._operation)
        if error is not None:
            raise error
        return self._operation

    def __iter__(self) -> Iterator[Operation]:
        return self._steps(None)

    def cancel(self) -> Operation:
        """Ask for the end, for everyone who waits for it; it may still end well."""
        request = operation_service_pb2.CancelOperationRequest(name=self.name)
        self._operation = self._transport.unary(self._transport.operations.CancelOperation, request)
        return self._operation

    def pause(self) -> Operation:
        """Stop a download and keep what it has. Raises PreconditionFailed where that is not possible."""
        request = operation_service_pb2.PauseOperationRequest(name=self.name)
        self._operation = self._transport.unary(self._transport.operations.PauseOperation, request)
        return self._operation

    def resume(self) -> Operation:
        """Let a paused download go on."""
        request = operation_service_pb2.ResumeOperationRequest(name=self.name)
        self._operation = self._transport.unary(self._transport.operations.ResumeOperation, request)
        return self._operation

    def _steps(self, timeout: float | None, *, include_files: bool = False) -> Iterator[Operation]:
        if self.done:
            yield self._operation
            return
        follow = Follow(self._operation, time.monotonic(), timeout)
        request = operation_service_pb2.WatchOperationRequest(
            name=self.name, include_files=include_files
        )
        while not self.done:
            stream = self._transport.stream(
                self._transport.operations.WatchOperation,
                request,
                follow.remaining(time.monotonic()),
            )
            error: ModelhostError | None = None
            try:
                while (operation := stream.read()) is not None:
                    follow.received(operation)
                    self._operation = operation
                    yield operation
            except ModelhostError as broken:
                error = broken
            finally:
                stream.cancel()
            if not self.done:
                self._transport.pause(follow.broken(error, time.monotonic()))


class Operations:
    """What ``Client`` does with operations."""

    _transport: Transport

    def operations(
        self,
        model: str | None = None,
        *,
        kinds: Iterable[str] = (),
        states: Iterable[str] = (),
        limit: int | None = None,
    ) -> list[Operation]:
        """List operations, newest first; ``limit`` = at most so many, None = all that are kept.

        ``kinds`` and ``states`` are names of the contract: ``DOWNLOAD``, ``RUNNING``.
        """
        request = operation_service_pb2.ListOperationsRequest(
            model=_names.model_name(model) if model else "",
            kinds=[_enums.number_of(Operation.Kind, kind, "kinds") for kind in kinds],
            states=[_enums.number_of(Operation.State, state, "states") for state in states],
            page_size=PAGE_SIZE if limit is None else min(limit, PAGE_SIZE),
        )
        found: list[Operation] = []
        while True:
            page = self._transport.unary(self._transport.operations.ListOperations, request)
            found.extend(page.operations)
            if not page.next_page_token or (limit is not None and len(found) >= limit):
                return found if limit is None else found[:limit]
            request.page_token = page.next_page_token

    def operation(self, operation: str) -> OperationHandle:
        """Return a handle of an operation, by id or name. Raises NotFound."""
        request = operation_service_pb2.GetOperationRequest(name=_names.operation_name(operation))
        found = self._transport.unary(self._transport.operations.GetOperation, request)
        return OperationHandle(self._transport, found)

    def cancel(self, operation: str) -> Operation:
        """Ask for an operation's end; one that has ended is no error. Raises NotFound."""
        request = operation_service_pb2.CancelOperationRequest(
            name=_names.operation_name(operation)
        )
        return self._transport.unary(self._transport.operations.CancelOperation, request)

    def update_operation(
        self,
        operation: str,
        *,
        priority: int | None = None,
        rate_limit_bytes_per_second: int | None = None,
    ) -> Operation:
        """Change an operation's priority (-100 to 100) or its rate limit (0 = none); acts at once."""
        request = operation_service_pb2.UpdateOperationRequest(
            operation=Operation(name=_names.operation_name(operation))
        )
        if priority is not None:
            request.operation.priority = priority
            request.update_mask.paths.append("priority")
        if rate_limit_bytes_per_second is not None:
            request.operation.rate_limit_bytes_per_second = rate_limit_bytes_per_second
            request.update_mask.paths.append("rate_limit_bytes_per_second")
        return self._transport.unary(self._transport.operations.UpdateOperation, request)

    def _as_asked(
        self, operation: Operation, priority: int, rate_limit_bytes_per_second: int = 0
    ) -> Operation:
        """Give work that was joined the priority and the limit that are asked for here; 0 = none is."""
        changes: dict[str, int] = {}
        if priority not in (0, operation.priority):
            changes["priority"] = priority
        if rate_limit_bytes_per_second not in (0, operation.rate_limit_bytes_per_second):
            changes["rate_limit_bytes_per_second"] = rate_limit_bytes_per_second
        if not changes or is_final(operation):
            return operation
        try:
            return self.update_operation(operation.name, **changes)
        except PreconditionFailed:
            return operation  # It has ended meanwhile.

    def _handle(
        self,
        operation: Operation,
        *,
        wait: bool,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> OperationHandle:
        """Return an operation's handle, at its end where ``wait`` says so."""
        handle = OperationHandle(self._transport, operation)
        if wait:
            handle.result(timeout, progress=progress)
        return handle
