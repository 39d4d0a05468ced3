"""An operation is followed to its end, whatever happens on the way."""

import asyncio

import grpc
import pytest

from modelhost import (
    AsyncClient,
    Cancelled,
    Client,
    NotFound,
    OperationHandle,
    OutOfMemory,
    PreconditionFailed,
    Timeout,
    Unavailable,
    Unreachable,
)
from modelhost._follow import LONGEST_DELAY_S, PATIENCE_S, Follow
from modelhost.v1 import errors_pb2, operation_service_pb2, operations_pb2
from tests.client.double import Double, failure, hold

Operation = operations_pb2.Operation
NAME = "operations/11111111-2222-4333-8444-555555555555"


def operation(state: str, done: int = 0, **fields) -> Operation:
    made = Operation(name=NAME, model="models/a", kind="DOWNLOAD", state=state, **fields)
    made.progress.done_bytes = done
    made.progress.total_bytes = 100
    return made


def failed(reason: str, code: str, state: str = "FAILED") -> Operation:
    made = operation(state)
    made.error.reason = reason
    made.error.code = errors_pb2.Error.Code.Value(code)
    made.error.message = "why"
    return made


RUNNING = operation("RUNNING", 10)
HALF = operation("RUNNING", 50)
DONE = operation("SUCCEEDED", 100)


def script(*parts):
    def answer(request, context):
        for part in parts:
            if callable(part):
                part(request, context)
            else:
                yield part

    return answer


@pytest.fixture
def started(double: Double) -> Double:
    """A double that answers a download with an operation that runs."""
    double.on("DownloadModel", RUNNING)
    double.on("GetOperation", RUNNING)
    return double


def states(handle: OperationHandle) -> list[int]:
    return [step.progress.done_bytes for step in handle]


def test_iterating_shows_each_step_and_ends(started: Double, client: Client) -> None:
    """The states come as the daemon sends them; the handle holds the last."""
    started.on("WatchOperation", script(RUNNING, HALF, DONE))
    handle = client.pull("a", wait=False)
    assert not handle.done
    assert states(handle) == [10, 50, 100]
    assert handle.done
    assert handle.operation == DONE
    assert (handle.name, handle.model) == (NAME, "models/a")
    assert "SUCCEEDED" in repr(handle)


def test_async_iteration_does_the_same(started: Double) -> None:
    """The asynchronous handle is iterated with ``async for``."""
    started.on("WatchOperation", script(RUNNING, DONE))

    async def run() -> list[int]:
        async with AsyncClient(started.target, retries=False) as client:
            handle = await client.pull("a", wait=False)
            return [step.progress.done_bytes async for step in handle]

    assert asyncio.run(run()) == [10, 100]


def test_a_finished_operation_needs_no_call(double: Double, client: Client) -> None:
    """Work that was done already is shown once, without a stream."""
    double.on("DownloadModel", DONE)
    handle = client.pull("a")
    assert handle.done
    assert states(handle) == [100]
    assert double.requests("WatchOperation") == []


def test_the_result_is_the_operation(started: Double, both) -> None:
    """``result`` waits for the end and reports each state to the callable on the way."""
    started.on("WatchOperation", script(RUNNING, DONE))
    seen: list[int] = []
    handle = both(lambda c: c.pull("a", progress=lambda o: seen.append(o.progress.done_bytes)))
    assert handle.operation == DONE
    assert seen == [10, 100]


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (failed("OUT_OF_DEVICE_MEMORY", "RESOURCE_EXHAUSTED"), OutOfMemory),
        (failed("GATED", "FAILED_PRECONDITION"), PreconditionFailed),
        (failed("CANCELLED", "CANCELLED", "CANCELLED"), Cancelled),
        (failed("DAEMON_RESTARTED", "UNAVAILABLE"), Unavailable),
    ],
    ids=["memory", "gated", "cancelled", "restarted"],
)
def test_the_result_of_a_failure_is_its_error(started: Double, both, end, kind) -> None:
    """What the operation failed with is raised, with its name beside it."""
    started.on("WatchOperation", script(RUNNING, end))
    with pytest.raises(kind) as caught:
        both(lambda c: c.pull("a"))
    assert caught.value.metadata["operation"] == NAME


@pytest.mark.parametrize(
    "end",
    [failure(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"), script(RUNNING)],
    ids=["shutting down", "closed in order"],
)
def test_a_broken_stream_is_opened_again(started: Double, both, end) -> None:
    """A stream that ends before the operation does is no end."""
    started.on("WatchOperation", end, script(HALF, DONE))
    assert both(lambda c: c.pull("a")).operation == DONE
    assert len(started.requests("WatchOperation")) == 2


def test_an_operation_is_followed_over_a_restart(started: Double, client: Client) -> None:
    """The daemon stops and comes back on the same socket: the steps go on."""
    started.on("WatchOperation", script(RUNNING, hold), script(HALF, DONE))
    steps = iter(client.pull("a", wait=False))
    assert next(steps) == RUNNING
    started.stop()
    started.start()
    assert list(steps) == [HALF, DONE]


def test_an_operation_that_is_gone_is_not_found(started: Double, client: Client) -> None:
    """A daemon that does not know the operation any more ends the wait."""
    started.on("WatchOperation", failure(grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND"))
    with pytest.raises(NotFound):
        client.pull("a")


def test_a_wait_that_takes_too_long_says_that_the_work_goes_on(started: Double, both) -> None:
    """Timeout names the operation, its state and how to wait again; nothing is cancelled."""
    started.on("WatchOperation", script(HALF, hold))
    with pytest.raises(Timeout) as caught:
        both(lambda c: c.pull("a", timeout=0.05))
    assert NAME in str(caught.value)
    assert "RUNNING after 0.05 s" in str(caught.value)
    assert "modelhost ops wait" in caught.value.hint
    assert started.requests("CancelOperation") == []


def test_leaving_the_iteration_ends_its_stream_only(started: Double, client: Client) -> None:
    """A loop that is left cancels the stream, not the operation."""
    started.on("WatchOperation", script(RUNNING, hold))
    for _ in client.pull("a", wait=False):
        break
    started.stop()  # Waits for every handler: the stream's has ended.
    assert started.requests("CancelOperation") == []


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "refresh"])
def test_a_handle_steers_its_operation(started: Double, client: Client, verb) -> None:
    """cancel, pause, resume and refresh address the operation and keep the answer."""
    method = {"refresh": "Get"}.get(verb, verb.capitalize()) + "Operation"
    started.on(method, HALF)
    handle = client.pull("a", wait=False)
    assert getattr(handle, verb)() == HALF
    assert handle.operation == HALF
    assert [r.name for r in started.requests(method)] == [NAME]


def test_operations_are_listed_over_pages(double: Double, both) -> None:
    """All pages are read up to the limit; filters are the contract's words."""
    first = operation_service_pb2.ListOperationsResponse(operations=[DONE, DONE])
    first.next_page_token = "x"
    last = operation_service_pb2.ListOperationsResponse(operations=[RUNNING])
    double.on("ListOperations", first, last)
    assert both(lambda c: c.operations("a", kinds=["download"], states=["RUNNING"])) == [
        *(DONE, DONE, RUNNING)
    ]
    request, again = double.requests("ListOperations")
    assert (request.model, request.kinds, request.states) == (
        "models/a",
        [Operation.DOWNLOAD],
        [Operation.RUNNING],
    )
    assert again.page_token == "x"


def test_a_limit_ends_the_list(double: Double, both) -> None:
    """With a limit no further page is asked for."""
    page = operation_service_pb2.ListOperationsResponse(operations=[DONE] * 3, next_page_token="x")
    double.on("ListOperations", page)
    assert len(both(lambda c: c.operations(limit=2))) == 2
    assert len(double.requests("ListOperations")) == 1


def test_an_operation_can_be_found_and_steered_by_its_id(double: Double, both) -> None:
    """A bare id is enough."""
    double.on("GetOperation", HALF)
    double.on("CancelOperation", HALF)
    double.on("UpdateOperation", HALF)
    short = NAME.partition("/")[2]
    assert both(lambda c: c.operation(short)).operation == HALF
    assert both(lambda c: c.cancel(short)) == HALF
    both(lambda c: c.update_operation(short, priority=5, rate_limit_bytes_per_second=0))
    (update,) = double.requests("UpdateOperation")
    assert update.operation.name == NAME
    assert update.operation.priority == 5
    assert list(update.update_mask.paths) == ["priority", "rate_limit_bytes_per_second"]


# --- the state machine --------------------------------------------------------------------------------


def test_patience_has_an_end() -> None:
    """A daemon that stays away for a minute ends the following; a message begins the minute anew."""
    follow = Follow(RUNNING, started=0.0)
    away = Unreachable("away")
    assert follow.broken(away, now=0.0) == 0.1
    assert follow.broken(away, now=PATIENCE_S) <= LONGEST_DELAY_S
    follow.received(HALF)
    follow.broken(away, now=PATIENCE_S + 1)
    follow.broken(away, now=PATIENCE_S + 2)
    with pytest.raises(Unreachable):
        follow.broken(away, now=2 * PATIENCE_S + 2)


def test_the_remaining_time_runs_over_breaks() -> None:
    """The time limit is the caller's, not that of one stream."""
    follow = Follow(RUNNING, started=10.0, timeout=5.0)
    assert follow.remaining(12.0) == 3.0
    with pytest.raises(Timeout):
        follow.remaining(15.0)
    assert Follow(RUNNING, started=10.0).remaining(1e9) is None
