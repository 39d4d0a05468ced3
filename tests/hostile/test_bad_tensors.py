"""Wrong tensors against the live daemon: each refused with field, expected and actual; nobody else notices."""

from collections.abc import Callable, Iterator

import grpc
import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.hostile.judge import typed
from tests.hostile.live import CALL_S, Live, live
from tests.hostile.messages import entry, varint

INFER = "/inference.GRPCInferenceService/ModelInfer"
MANY = 10_000_000

Change = Callable[[oip.ModelInferRequest], None]


@pytest.fixture(scope="module")
def at() -> Iterator[Live]:
    """Start a daemon with a model that takes at most four items, and a neighbour in the same worker."""
    with live(models=("m", "dear")) as running:
        load = oip.RepositoryModelLoadRequest(model_name="m")
        load.parameters["config"].string_param = '{"max_batch_size": 4}'
        GRPCInferenceServiceStub(running.channel).RepositoryModelLoad(load, timeout=CALL_S)
        yield running
        running.check_alive()
        running.check_log()
        assert running.worker_pids() == running.workers


def good() -> oip.ModelInferRequest:
    """Return a request that works: two items of three numbers, and two texts."""
    made = oip.ModelInferRequest(model_name="m", id="1")
    made.inputs.add(name="x", datatype="FP32", shape=[2, 3])
    made.inputs.add(name="t", datatype="BYTES", shape=[2])
    made.raw_input_contents.extend([bytes(24), b"\1\0\0\0a\2\0\0\0bc"])
    return made


def setting(path: str, value: object) -> Change:
    """Return what changes one thing of the first input, or of the second: ``t.shape``."""
    name, _, field = path.partition(".")

    def change(made: oip.ModelInferRequest) -> None:
        tensor = made.inputs["xt".index(name)]
        if field == "shape":
            del tensor.shape[:]
            tensor.shape.extend(value)  # type: ignore[call-overload]
        elif field == "raw":
            made.raw_input_contents["xt".index(name)] = value  # type: ignore[call-overload]
        else:
            setattr(tensor, field, value)

    return change


def contents(datatype: str, **values: object) -> Change:
    """Return what gives one input typed contents."""

    def change(made: oip.ModelInferRequest) -> None:
        del made.inputs[1], made.raw_input_contents[:]
        made.inputs[0].datatype = datatype
        made.inputs[0].contents.MergeFrom(oip.InferTensorContents(**values))  # type: ignore[arg-type]

    return change


def parameter(key: str, **value: object) -> Change:
    """Return what sets a parameter of the request."""

    def change(made: oip.ModelInferRequest) -> None:
        made.parameters[key].MergeFrom(oip.InferParameter(**value))  # type: ignore[arg-type]

    return change


def doubled(made: oip.ModelInferRequest) -> None:
    """Give the second input the first one's name."""
    made.inputs[1].name = "x"


WRONG: dict[str, tuple[Change, str, str]] = {
    "negative size": (setting("x.shape", [-1, 3]), "inputs[x].shape", "0 and more"),
    "sizes that overflow": (setting("x.shape", [2**32, 2**32]), "inputs[x].shape", "at most"),
    "sizes that overflow to right": (setting("x.shape", [2**61, 8, 6]), "inputs[x].shape", "at most"),
    "overflow beside nothing": (setting("x.shape", [0, 2**62, 4]), "inputs[x].shape", "at most"),
    "too many dimensions": (setting("x.shape", [1] * 9), "inputs[x].shape", "8 dimensions"),
    "bytes too few": (setting("x.raw", bytes(23)), "raw_input_contents[x]", "24 bytes"),
    "bytes too many": (setting("x.raw", bytes(25)), "raw_input_contents[x]", "24 bytes"),
    "a length past the end": (setting("t.raw", b"\1\0\0\0a\3\0\0\0bc"), "raw_input_contents[t]", "2 el"),
    "a length of 4 GiB": (setting("t.raw", b"\xff" * 4), "raw_input_contents[t]", "2 elements"),
    "texts left over": (setting("t.raw", b"\0\0\0\0" * 3), "raw_input_contents[t]", "2 elements"),
    "no such datatype": (setting("x.datatype", "FP8"), "inputs[x].datatype", "FP16"),
    "no name": (setting("x.name", ""), "inputs.name", "1 to 256"),
    "the name twice": (doubled, "inputs", "once"),
    "an empty batch": (setting("x.shape", [0, 3]), "raw_input_contents[x]", "0 bytes"),
    "a batch above the most": (contents("INT8", int_contents=[1] * 6), "inputs", "at most 4 items"),
    "half as contents": (contents("FP16", fp32_contents=[0.5] * 6), "inputs[x].contents", "raw"),
    "bfloat as contents": (contents("BF16", fp32_contents=[0.5] * 6), "inputs[x].contents", "raw"),
    "contents elsewhere": (contents("FP32", fp64_contents=[0.5] * 6), "inputs[x].contents", "fp32_"),
    "contents out of range": (contents("UINT8", uint_contents=[256] * 6), "inputs[x].contents", "255"),
    "contents too few": (contents("BOOL", bool_contents=[True] * 5), "inputs[x].contents", "6 el"),
    "a reserved parameter": (parameter("triton_x", bool_param=True), "parameters[triton_x]", "triton_"),
    "a timeout below 0": (parameter("timeout", int64_param=-1), "parameters[timeout]", "from 0"),
    "a timeout of text": (parameter("timeout", string_param="nan"), "parameters[timeout]", "from 0"),
}  # fmt: skip


def test_each_wrong_tensor_is_named_with_what_was_expected(at: Live) -> None:
    """INVALID_ARGUMENT says which field, what would be right and what came; the right request goes on working."""
    infer = at.channel.unary_unary(INFER)
    assert infer(good().SerializeToString(), timeout=CALL_S)
    for name, (change, field, expected) in WRONG.items():
        made = good()
        change(made)
        if name == "a batch above the most":
            made.inputs[0].shape[:] = [6]
        with pytest.raises(grpc.RpcError) as caught:
            infer(made.SerializeToString(), timeout=CALL_S)
        found = typed(caught.value)
        assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", field), name
        assert expected in found.metadata["expected"], name
        assert found.metadata["actual"], name
    empty = good()
    empty.inputs[0].shape[:] = [0, 3]
    empty.inputs[1].shape[:] = [0]
    empty.raw_input_contents[:] = [b"", b""]
    with pytest.raises(grpc.RpcError) as caught:
        infer(empty.SerializeToString(), timeout=CALL_S)
    assert typed(caught.value).metadata["expected"] == "1 item or more"
    assert infer(good().SerializeToString(), timeout=CALL_S)


def ten_million(datatype: bytes, content: bytes, size: int = MANY) -> bytes:
    """Encode an input of so many elements with these contents."""
    shape = entry(3, varint(size))
    return entry(1, b"m") + entry(5, entry(1, b"x") + entry(2, datatype) + shape + content)


HUGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "numbers, one too many": (
        lambda: ten_million(b"INT64", entry(5, entry(3, b"\1" * MANY)), MANY - 1),
        "inputs[x].contents",
    ),
    "numbers, the last too large": (
        lambda: ten_million(b"INT8", entry(5, entry(2, b"\1" * (MANY - 1) + varint(300)))),
        "inputs[x].contents",
    ),
    "texts": (lambda: ten_million(b"BYTES", entry(5, b"\x42\0" * MANY)), "inputs"),
    "texts, raw": (
        lambda: ten_million(b"BYTES", b"") + entry(7, bytes(4 * MANY)),
        "inputs[x].shape",
    ),
    "sizes": (
        lambda: entry(1, b"m") + entry(5, entry(1, b"x") + entry(2, b"BOOL") + entry(3, b"\1" * MANY))
        + entry(7, b"\1"),
        "inputs[x].shape",
    ),
    "entries of raw contents": (lambda: entry(1, b"m") + b"\x3a\0" * MANY, "request"),
    "inputs": (lambda: entry(1, b"m") + b"\x2a\0" * MANY, "request"),
    "parameters": (lambda: entry(1, b"m") + b"\x22\0" * MANY, "request"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_ten_million_entries_are_refused(at: Live, name: str) -> None:
    """Whatever there are ten million of, the request is refused, and the neighbour is answered meanwhile."""
    make, field = HUGE[name]
    call = at.channel.unary_unary(INFER).future(make(), timeout=CALL_S)
    beside = good()
    beside.model_name = "dear"
    assert at.channel.unary_unary(INFER)(beside.SerializeToString(), timeout=CALL_S)
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    found = typed(caught.value)
    assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", field)
