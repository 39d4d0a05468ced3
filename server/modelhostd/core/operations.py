"""Operations: how they are made, joined, ended, queued and forgotten."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.lifecycle import OPERATION, step
from modelhostd.core.resources import (
    FINAL_STATES,
    Kind,
    Operation,
    OperationKind,
    OperationState,
    Progress,
    StoredError,
)
from modelhostd.core.state import Edit

PRIORITY_MIN, PRIORITY_MAX = -100, 100
RATE_LIMIT_MAX = 1 << 50


def new(
    key: str,
    kind: OperationKind,
    now: float,
    *,
    model: str = "",
    join_key: str = "",
    priority: int = 0,
    rate_limit: int = 0,
    principal: str = "",
) -> Operation:
    """Return a queued operation; ``join_key`` equal work shares (empty = never joined)."""
    check_rate_limit(rate_limit, "rate_limit_bytes_per_second")
    if not PRIORITY_MIN <= priority <= PRIORITY_MAX:
        raise invalid("priority", f"{PRIORITY_MIN} to {PRIORITY_MAX}", priority)
    return Operation(
        id=key,
        kind=kind,
        state=OperationState.QUEUED,
        create_time=now,
        model=model,
        join_key=join_key,
        priority=priority,
        rate_limit_bytes_per_second=rate_limit,
        principal=principal,
    )


def check_rate_limit(rate: int, field: str) -> None:
    """Raise INVALID_ARGUMENT for bytes a second that make no sense."""
    if not 0 <= rate <= RATE_LIMIT_MAX:
        raise invalid(field, f"0 to {RATE_LIMIT_MAX}", rate)


def moved(operation: Operation, state: OperationState, now: float) -> Operation:
    """Return the operation in another state, with the times that go with it."""
    step(OPERATION, operation.state, state)
    start = operation.start_time
    if state is OperationState.RUNNING and not start:
        start = now
    end = now if state in FINAL_STATES else 0.0
    return replace(operation, state=state, start_time=start, end_time=end)


def succeeded(
    operation: Operation, now: float, result: Mapping[str, Any], progress: Progress
) -> Operation:
    """Return the operation as ended well."""
    done = moved(operation, OperationState.SUCCEEDED, now)
    return replace(done, result=dict(result), progress=progress, error=None)


def failed(
    operation: Operation, now: float, error: ModelhostError, progress: Progress
) -> Operation:
    """Return the operation as ended with an error; the reason CANCELLED ends it CANCELLED."""
    state = OperationState.CANCELLED if error.reason is Reason.CANCELLED else OperationState.FAILED
    return replace(moved(operation, state, now), error=stored(error), progress=progress)


def stored(error: ModelhostError) -> StoredError:
    """Return an error in the form that operations and instances remember."""
    return StoredError(error.reason.value, error.message, dict(error.metadata), error.retry_delay_s)


def raised(error: StoredError) -> ModelhostError:
    """Return a remembered error as the error that the same failed call would raise."""
    return ModelhostError(
        Reason(error.reason), error.message, dict(error.metadata), error.retry_delay_s
    )


def edit(operation: Operation, reason: str = "") -> Edit:
    """Return the edit that stores an operation."""
    return Edit(Kind.OPERATION, operation.id, operation, reason or operation.state.value)


def delete_key(model: str, keep_entry: bool, version: int) -> str:
    """Return the join key of a DELETE: of a model, or of its files (``version`` 0 = all of them)."""
    return f"delete-files:{version}:{model}" if keep_entry else f"delete:{model}"


def refuse_while_deleted(
    operations: Iterable[Operation], model: str, version: int | None = None
) -> None:
    """Raise CONFLICTING_OPERATION while the model is being deleted, or (part of) its files.

    With a ``version`` only what takes that artifact away is in the way.
    """
    keys = {delete_key(model, True, 0), delete_key(model, False, 0)}
    keys.add(delete_key(model, True, version or 0))
    for operation in operations:
        if operation.kind is not OperationKind.DELETE or operation.state in FINAL_STATES:
            continue
        if operation.join_key in keys or (version is None and operation.model == model):
            raise ModelhostError(
                Reason.CONFLICTING_OPERATION,
                f"model '{model}' or files of it are being deleted (operation '{operation.id}'); "
                f"wait for its end and try again",
                {"model": model, "operation": operation.id},
            )


def queue(operations: Iterable[Operation], kind: OperationKind) -> Sequence[Operation]:
    """Return the waiting operations of one kind in the order they will start.

    Higher priority first, then first come: (0, t=1), (5, t=9), (0, t=0) -> 5@9, 0@0, 0@1. Those of
    one moment keep the order they are given in.
    """
    waiting = (o for o in operations if o.kind is kind and o.state is OperationState.QUEUED)
    return sorted(waiting, key=lambda o: (-o.priority, o.create_time))


def startable(
    waiting: Sequence[Operation],
    running: Iterable[str],
    host_of: Callable[[Operation], str],
    *,
    limit: int,
    per_host: int = 0,
) -> Sequence[Operation]:
    """Return those of ``waiting`` (in the order of ``queue``) that may start now.

    ``running``: the host of each that runs. At most ``limit`` run in all and ``per_host`` from one host
    (0 = no such limit); one whose host has no place lets those behind it pass.
    """
    hosts = Counter(running)
    places = limit - hosts.total()
    found: list[Operation] = []
    for operation in waiting:
        host = host_of(operation)
        if len(found) >= places:
            break
        if not per_host or hosts[host] < per_host:
            hosts[host] += 1
            found.append(operation)
    return found


def forgettable(
    operations: Iterable[Operation], now: float, keep_count: int, keep_age_s: float
) -> Sequence[Edit]:
    """Return the edits that drop finished operations beyond the newest ``keep_count`` or too old."""
    finished = sorted((o for o in operations if o.state in FINAL_STATES), key=lambda o: -o.end_time)
    return [
        Edit(Kind.OPERATION, o.id, None, "FORGOTTEN", {"model": o.model} if o.model else {})
        for place, o in enumerate(finished)
        if place >= keep_count or now - o.end_time > keep_age_s
    ]


def after_restart(operation: Operation, now: float) -> Operation:
    """Return what an unfinished operation of the last run is now.

    Downloads go on by themselves (RUNNING -> QUEUED, PAUSED stays) unless they were being cancelled;
    all else failed with its daemon.
    """
    if operation.state in FINAL_STATES:
        return operation
    if operation.kind is OperationKind.DOWNLOAD and operation.cancel_requested:
        return failed(operation, now, cancelled_error(operation), operation.progress)
    if operation.kind is OperationKind.DOWNLOAD:
        if operation.state is OperationState.PAUSED:
            return operation
        return moved(operation, OperationState.QUEUED, now)
    error = ModelhostError(
        Reason.DAEMON_RESTARTED,
        f"the daemon restarted during operation '{operation.id}'; start it again",
        {"operation": operation.id},
        retry_delay_s=0.0,
    )
    return failed(operation, now, error, operation.progress)


def cancelled_error(operation: Operation) -> ModelhostError:
    """Return the error a cancelled operation ends with."""
    return ModelhostError(
        Reason.CANCELLED,
        f"operation '{operation.id}' ({operation.kind.value} of '{operation.model}') was cancelled",
        {"operation": operation.id},
    )
