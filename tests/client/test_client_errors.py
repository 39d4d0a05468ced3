"""Every failure of a call becomes one class with everything the daemon said."""

import pickle
import threading

import grpc
import pytest

import modelhost
from modelhost import _errors, _status
from modelhost.v1 import errors_pb2, operations_pb2
from tests.client.double import Double, failure, hold

Status = grpc.StatusCode


def raised(both, call=lambda c: c.get("a")) -> modelhost.ModelhostError:
    """Return what a call raises."""
    with pytest.raises(modelhost.ModelhostError) as caught:
        both(call)
    return caught.value


REASONS = [
    (Status.NOT_FOUND, "MODEL_NOT_FOUND", modelhost.NotFound),
    (Status.INVALID_ARGUMENT, "INVALID_ARGUMENT", modelhost.InvalidArgument),
    (Status.ALREADY_EXISTS, "ALREADY_EXISTS", modelhost.AlreadyExists),
    (Status.FAILED_PRECONDITION, "MODEL_NOT_DOWNLOADED", modelhost.PreconditionFailed),
    (Status.FAILED_PRECONDITION, "BUDGET_TOO_SMALL", modelhost.BudgetTooSmall),
    (Status.ABORTED, "ETAG_MISMATCH", modelhost.Conflict),
    (Status.PERMISSION_DENIED, "PERMISSION_DENIED", modelhost.PermissionDenied),
    (Status.UNAUTHENTICATED, "", modelhost.PermissionDenied),
    (Status.RESOURCE_EXHAUSTED, "OUT_OF_DEVICE_MEMORY", modelhost.OutOfMemory),
    (Status.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE", modelhost.OutOfMemory),
    (Status.RESOURCE_EXHAUSTED, "QUEUE_FULL", modelhost.QueueFull),
    (Status.RESOURCE_EXHAUSTED, "INSUFFICIENT_DISK_SPACE", modelhost.ResourceExhausted),
    (Status.OUT_OF_RANGE, "SEQUENCE_COMPACTED", modelhost.OutOfRange),
    (Status.UNAVAILABLE, "WORKER_LOST", modelhost.Unavailable),
    (Status.UNAVAILABLE, "", modelhost.Unreachable),
    (Status.DEADLINE_EXCEEDED, "LOAD_TIMEOUT", modelhost.Timeout),
    (Status.CANCELLED, "CANCELLED", modelhost.Cancelled),
    (Status.UNIMPLEMENTED, "UNIMPLEMENTED", modelhost.Unimplemented),
    (Status.DATA_LOSS, "CHECKSUM_MISMATCH", modelhost.DataLoss),
    (Status.INTERNAL, "INTERNAL", modelhost.Internal),
    (Status.UNKNOWN, "", modelhost.Internal),
]


@pytest.mark.parametrize(
    ("code", "reason", "kind"), REASONS, ids=[f"{c.name}-{r}" for c, r, _ in REASONS]
)
def test_each_meaning_has_a_class(double: Double, both, code, reason, kind) -> None:
    """A status, with its reason where the daemon gave one, is raised as exactly one class."""
    double.on("GetModel", failure(code, reason))
    error = raised(both)
    assert type(error) is kind
    assert error.code == code.value[0]
    if reason:
        assert error.reason == reason


def test_an_error_has_what_the_daemon_said(double: Double, both) -> None:
    """Message, metadata, retry delay, request id and the next step are all there."""
    double.on(
        "GetModel",
        failure(
            Status.RESOURCE_EXHAUSTED,
            "OUT_OF_DEVICE_MEMORY",
            "needs 12 bytes",
            {"model": "models/a", "neededBytes": "12", "freeBytes": "7", "heldBy": "b, c"},
            retry_delay=1.5,
            request_id="r-1",
        ),
    )
    error = raised(both)
    assert isinstance(error, modelhost.OutOfMemory)
    assert str(error) == "needs 12 bytes"
    assert (error.needed_bytes, error.free_bytes, error.budget_bytes) == (12, 7, None)
    assert error.held_by == ("b", "c")
    assert error.retry_delay == 1.5
    assert error.retryable
    assert error.request_id == "r-1"
    assert "modelhost plan a" in error.hint


def test_an_unreachable_daemon_names_the_target_and_the_next_command(tmp_path) -> None:
    """Where nobody listens, the error says where, why, and how to start a daemon."""
    target = f"unix:{tmp_path}/none.sock"
    client = modelhost.Client(target, retries=False)
    with pytest.raises(modelhost.Unreachable) as caught:
        client.host()
    assert target in str(caught.value)
    assert "No such file" in str(caught.value)
    assert "modelhost serve" in caught.value.hint
    assert caught.value.retryable


def test_a_connection_that_breaks_is_unreachable(double: Double, client) -> None:
    """A daemon that goes away in a call is told apart from one that was never there."""

    def go_away(request, context):
        threading.Thread(target=double.stop).start()
        hold(request, context)

    double.on("GetHost", go_away)
    with pytest.raises(modelhost.Unreachable) as caught:
        client.host()
    assert double.target in str(caught.value)


def test_a_deadline_says_how_long(double: Double, both) -> None:
    """A call that gets no answer in time says which call, how long and where."""
    double.on("InspectSource", hold)
    error = raised(both, lambda c: c.inspect("hf://a/b", timeout=0.05))
    assert type(error) is modelhost.Timeout
    assert "InspectSource got no answer within 0.05 s" in str(error)


@pytest.mark.parametrize(
    "details", [b"\xff\xff", b"", b"\x08\x05\x1a\x03\x0a\x01x"], ids=["bad", "empty", "unknown"]
)
def test_details_that_cannot_be_read_are_left_out(double: Double, both, details) -> None:
    """A broken or unknown status detail costs the detail, not the error."""

    def answer(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(Status.NOT_FOUND, "nothing here")

    double.on("GetModel", answer)
    error = raised(both)
    assert type(error) is modelhost.NotFound
    assert "nothing here" in str(error)


def test_details_of_another_domain_are_not_ours(double: Double, both) -> None:
    """An ErrorInfo of a proxy is not taken for a reason of modelhost."""
    double.on("GetModel", failure(Status.UNAVAILABLE, "QUEUE_FULL", domain="proxy.example"))
    assert type(raised(both)) is modelhost.Unreachable


def test_a_method_that_is_not_served_is_named(double: Double, both) -> None:
    """UNIMPLEMENTED without details names the method and the target."""
    error = raised(both, lambda c: c.storage())
    assert type(error) is modelhost.Unimplemented
    assert "GetStorage" in str(error)


def test_a_message_that_is_too_large_says_by_whom(double: Double, both) -> None:
    """Where grpc refuses a message, the error has both sizes, and whose limit it is."""
    text = "SERVER: Received message larger than max (900 vs. 700)"
    double.on("GetModel", failure(Status.RESOURCE_EXHAUSTED, message=text))
    error = raised(both)
    assert type(error) is modelhost.ResourceExhausted
    assert error.reason == "MESSAGE_TOO_LARGE"
    assert "GetModel needs a message of 900 bytes, and the daemon at" in str(error)
    double.on(
        "GetModel", failure(Status.RESOURCE_EXHAUSTED, message=text.replace("SERVER", "CLIENT"))
    )
    assert "this client takes at most 700" in str(raised(both))
    double.on("GetModel", failure(Status.RESOURCE_EXHAUSTED, message="larger than max"))
    assert raised(both).reason == "MESSAGE_TOO_LARGE"


def test_an_operations_error_is_the_same_class_as_a_calls() -> None:
    """What an operation failed with is raised as the same failure of a call would be."""
    operation = operations_pb2.Operation(name="operations/1", state=operations_pb2.Operation.FAILED)
    operation.error.CopyFrom(
        errors_pb2.Error(
            reason="MODEL_TOO_LARGE",
            code=errors_pb2.Error.RESOURCE_EXHAUSTED,
            message="too large",
            metadata={"neededBytes": "9"},
        )
    )
    operation.error.retry_delay.FromMilliseconds(250)
    error = _status.error_from_operation(operation)
    assert isinstance(error, modelhost.OutOfMemory)
    assert error.needed_bytes == 9
    assert error.retry_delay == 0.25
    assert error.metadata["operation"] == "operations/1"


def test_a_refused_budget_tells_what_would_do(double: Double, both) -> None:
    """The least that would be taken and who holds it are attributes; the hint is the command with that number."""
    metadata = {"device": "sim-0", "budgetBytes": "1", "neededBytes": "9", "heldBy": "a,b"}
    double.on(
        "GetModel", failure(Status.FAILED_PRECONDITION, "BUDGET_TOO_SMALL", metadata=metadata)
    )
    error = raised(both)
    assert isinstance(error, modelhost.BudgetTooSmall)
    assert (error.needed_bytes, error.held_by) == (9, ("a", "b"))
    assert "`modelhost budget sim-0 9`" in error.hint


def test_an_error_of_a_newer_daemon_is_still_an_error() -> None:
    """A code and a reason that this client does not know make an error with both kept."""
    message = errors_pb2.Error(reason="NEW_ONE", message="new")
    message.code = 99
    error = _status.error_from_message(message)
    assert type(error) is modelhost.Internal
    assert error.reason == "NEW_ONE"


def test_errors_survive_pickling() -> None:
    """An error can go to another process whole."""
    error = _errors.make_error(
        "no", code=_errors.Code.NOT_FOUND, reason="MODEL_NOT_FOUND", metadata={"model": "a"}
    )
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is modelhost.NotFound
    assert copy.__dict__ == error.__dict__


def test_every_reason_of_the_contract_has_the_class_of_its_code() -> None:
    """No reason of the contract is without a class, and its class is one for its code."""
    for value in errors_pb2.Reason.DESCRIPTOR.values:
        spec = value.GetOptions().Extensions[errors_pb2.error_spec]
        if value.number:
            kind = _errors.error_class(_errors.Code(spec.code), value.name)
            assert kind.default_code == spec.code, value.name


def test_hints_use_only_what_the_reasons_carry() -> None:
    """A hint that needs a name is filled from the metadata keys that its reason has."""
    for value in errors_pb2.Reason.DESCRIPTOR.values:
        keys = value.GetOptions().Extensions[errors_pb2.error_spec].keys
        hint = _errors.hint_for(value.name, dict.fromkeys(keys, "x"))
        assert bool(hint) == (value.name in _errors._HINTS), value.name
