"""Errors as google.rpc details: each reason with what belongs to it, within what trailers may hold."""

import pytest
from google.rpc import error_details_pb2, status_pb2

from modelhostd.api import errors
from modelhostd.core.errors import REASONS, ModelhostError, Reason


def _details(error: ModelhostError) -> dict[str, object]:
    found = {}
    for packed in errors.status_of(error).details:
        name = packed.TypeName().removeprefix("google.rpc.")
        found[name] = getattr(error_details_pb2, name)()
        packed.Unpack(found[name])
    return found


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_has_its_details(reason: Reason) -> None:
    """ErrorInfo always, RetryInfo where there is a delay, and the one that goes with the code."""
    metadata = dict.fromkeys(REASONS[reason].keys, "minilm")
    error = ModelhostError(reason, "what happened; what to do", metadata, 2.5)
    found = _details(error)
    info = found.pop("ErrorInfo")
    assert (info.reason, info.domain, dict(info.metadata)) == (
        reason.value,
        "modelhost",
        metadata,
    )
    assert found.pop("RetryInfo").retry_delay.seconds == 2
    by_code = {
        "INVALID_ARGUMENT": ["BadRequest"],
        "FAILED_PRECONDITION": ["PreconditionFailure"],
        "NOT_FOUND": ["ResourceInfo"],
        "ALREADY_EXISTS": ["ResourceInfo"],
    }
    assert list(found) == by_code.get(error.code.name, [])


@pytest.mark.parametrize(
    ("reason", "metadata", "kind", "name"),
    [
        (Reason.MODEL_NOT_FOUND, {"model": "m"}, "modelhost.v1.Model", "models/m"),
        (Reason.DEVICE_NOT_FOUND, {"device": "cpu"}, "modelhost.v1.Device", "devices/cpu"),
        (
            Reason.OPERATION_NOT_FOUND,
            {"operation": "o"},
            "modelhost.v1.Operation",
            "operations/o",
        ),
        (Reason.ALREADY_EXISTS, {"name": "models/m"}, "modelhost.v1.Model", "models/m"),
        (
            Reason.INSTANCE_NOT_FOUND,
            {"instance": "models/m/instances/1"},
            "modelhost.v1.Instance",
            "models/m/instances/1",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else "",
)
def test_a_resource_is_named_in_full(
    reason: Reason, metadata: dict[str, str], kind: str, name: str
) -> None:
    """ResourceInfo has the type and the full resource name, whatever form the metadata has."""
    found = _details(ModelhostError(reason, "gone", metadata))["ResourceInfo"]
    assert (found.resource_type, found.resource_name) == (kind, name)


@pytest.mark.parametrize("letter", ["a", "é", "模", "\n", "\0"], ids=["a", "e", "han", "nl", "nul"])
def test_trailers_stay_below_what_clients_take(letter: str) -> None:
    """However long text and metadata are, text and details together stay below 8 KiB on the wire."""
    error = ModelhostError(
        Reason.MODEL_BLOCKED, letter * 50_000, {"model": letter * 9000, "stderr": letter * 90_000}
    )
    status = errors.status_of(error)
    encoded = status.SerializeToString()
    assert len(encoded) * 4 / 3 + errors.MESSAGE_BYTES_MAX < 7 * 1024
    assert status.message.startswith(errors.text(letter))
    assert status.message.endswith("...")


def test_trailers_carry_the_request_id() -> None:
    """Beside the details stands the id that the log has, where there is one."""
    error = ModelhostError(Reason.INTERNAL, "x")
    details, request = errors.trailers(error, "r-1")
    assert status_pb2.Status.FromString(details[1]).code == 13
    assert (details[0], request) == ("grpc-status-details-bin", ("x-request-id", "r-1"))
    assert len(errors.trailers(error)) == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("input 'ä€' is fine", "input 'ä€' is fine"),
        ("input '\x1f\n' is\x1b[2J", "input '\\x1f\\n' is\\x1b[2J"),
        ("'\u202egpj.exe' \u2028 \U000e0001", "'\\u202egpj.exe' \\u2028 \\U000e0001"),
    ],
    ids=["plain", "control", "direction"],
)
def test_a_message_has_nothing_that_moves_a_terminal(message: str, expected: str) -> None:
    """What a caller put into a name comes back escaped: messages are for people, and for their logs."""
    error = ModelhostError(Reason.INVALID_ARGUMENT, message)
    assert errors.text(message) == expected
    assert errors.status_of(error).message == expected
    assert errors.text("\0" * 5000).isprintable()
