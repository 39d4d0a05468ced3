"""Messages made against the way of a request: refused in type, and never answered by another model."""

from collections.abc import Iterator

import grpc
import pytest

from modelhost.oip import open_inference_pb2 as oip
from tests.hostile.judge import typed
from tests.hostile.live import CALL_S, Live, live
from tests.hostile.messages import entry, nested, varint

INFER = "/inference.GRPCInferenceService/ModelInfer"
MIB = 1 << 20


@pytest.fixture(scope="module")
def at() -> Iterator[Live]:
    """Start a daemon with two models, the second of which nobody may reach by the name of the first."""
    with live(models=("cheap", "dear")) as running:
        yield running
        running.check_log()


def tensor(size: int = 4) -> bytes:
    """Encode one input with its raw contents, without a name of a model."""
    made = oip.ModelInferRequest()
    made.inputs.add(name="x", datatype="UINT8", shape=[size])
    made.raw_input_contents.append(bytes(size))
    return made.SerializeToString()


def infer(at: Live, request: bytes) -> str:
    """Send bytes; return the name that the answer bears, or the reason of the refusal."""
    try:
        data = at.channel.unary_unary(INFER)(request, timeout=CALL_S)
    except grpc.RpcError as error:
        return typed(error).reason
    return oip.ModelInferResponse.FromString(data).model_name


@pytest.mark.parametrize("size", [4, 20_000, 2 * MIB], ids=["small", "framed", "arena"])
def test_of_two_names_the_last_counts_for_daemon_and_worker(at: Live, size: int) -> None:
    """Wherever the second name stands, and by whichever way the message goes, it is the model's."""
    cheap, dear, body = entry(1, b"cheap"), entry(1, b"dear"), tensor(size)
    assert infer(at, cheap + body + dear) == "dear"
    assert infer(at, dear + body + cheap) == "cheap"
    assert infer(at, cheap + dear + body) == "dear"
    assert infer(at, cheap + body + dear + cheap) == "cheap"
    assert infer(at, dear + body + entry(1, b"")) == "MODEL_NOT_FOUND"
    assert infer(at, body + b"\x0a\x84\x80\x80\x00dear" + entry(2, b"1")) == "dear"


@pytest.mark.parametrize(
    "tail",
    [
        # A name that one of the parsers may see and the other not.
        b"\x0b" + entry(1, b"dear") + b"\x0c",
        b"\x0a\x04dea",
        b"\x0a\xff\xff\xff\xff\x0f" + b"dear",
        b"\x0d" + b"dear",
        b"\x09" + b"deardear",
        varint((1 << 32 | 1 << 3) | 2) + b"\x04dear",
        varint((1 << 29 | 1) << 3 | 2) + b"\x04dear",
        b"\x8a\x00\x04dear",
        b"\x8a\x80\x80\x80\x00\x04dear",
        b"\x8a\x80\x80\x80\x80\x00\x04dear",
        b"\x8a\x80\x80\x80\x10\x04dear",
    ],
    ids=["group", "cut", "endless", "fixed32", "fixed64", "number-2^29", "number-2^29+1",
         "long-key-2", "long-key-5", "long-key-6", "key-above"],
)  # fmt: skip
def test_a_name_in_an_odd_encoding_reaches_the_same_model_or_none(at: Live, tail: bytes) -> None:
    """What two parsers could read in two ways is refused, or answered as protobuf itself reads it."""
    for size in (4, 20_000):
        request = entry(1, b"cheap") + tensor(size) + tail
        found = infer(at, request)
        if found not in ("INVALID_ARGUMENT", "MODEL_NOT_FOUND"):
            assert found == oip.ModelInferRequest.FromString(request).model_name


HOSTILE = {
    "two million empty fields": entry(1, b"cheap") + b"\x3a\0" * 2_000_000,
    "two million fields that nobody knows": entry(1, b"cheap") + b"\xfa\x01\0" * 2_000_000,
    "two million names": b"\x0a\0" * 2_000_000,
    "two million in a parameter": entry(1, b"cheap") + entry(4, b"\x0a\0" * 2_000_000),
    "two million inputs in one": entry(1, b"cheap") + entry(5, b"\x0a\0" * 2_000_000),
    "two million sizes": entry(1, b"cheap") + entry(5, b"\x18\1" * 2_000_000),
    "two million elements": entry(1, b"cheap") + entry(5, entry(5, b"\x42\0" * 2_000_000)),
    "deep in an input": entry(1, b"cheap") + nested(5, 5000),
    "deep in what nobody knows": entry(1, b"cheap") + tensor() + b"\x7b" * 5000,
    "groups": entry(1, b"cheap") + b"\x0b\x0c" * 1000,
    "a name of megabytes": entry(1, b"c" * (4 * MIB)),
    "an id of megabytes": entry(1, b"cheap") + entry(3, b"c" * (4 * MIB)),
    "a tensor's name of megabytes": entry(1, b"cheap") + entry(5, entry(1, b"c" * (4 * MIB))),
    "nothing but a length": b"\x3a\xff\xff\xff\x7f",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_was_made_to_hurt_is_refused(at: Live, name: str) -> None:
    """INVALID_ARGUMENT, whoever finds it out; daemon and worker are the same, and answer the next."""
    assert infer(at, HOSTILE[name]) == "INVALID_ARGUMENT"
    assert infer(at, entry(1, b"dear") + tensor()) == "dear"
    at.check_alive()
    assert at.worker_pids() == at.workers


def test_what_nobody_knows_is_passed_over_however_deep_it_is(at: Live) -> None:
    """Fields that the protocol does not have are bytes to both parsers: nothing goes down into them."""
    assert infer(at, entry(1, b"dear") + tensor() + entry(4, nested(4, 5000))) == "dear"
    assert infer(at, entry(1, b"dear") + tensor() + nested(99, 5000)) == "dear"


def test_a_message_cut_anywhere_is_refused(at: Live) -> None:
    """Every beginning of a good message is refused in type, or is the message with less in it."""
    whole = entry(1, b"dear") + tensor(40) + entry(3, b"id")
    for end in range(len(whole)):
        found = infer(at, whole[:end])
        assert found in ("INVALID_ARGUMENT", "MODEL_NOT_FOUND", "dear"), end
    assert infer(at, whole) == "dear"
    assert at.worker_pids() == at.workers
