"""ModelInferRequest in, ModelInferResponse out: every datatype, every refusal, and no surprise from bytes."""

import struct

import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.utils import np_to_triton_dtype

from modelhost.oip import open_inference_pb2 as pb
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker import fields, oip
from modelhostd.worker.backend import Signature, Tensor, TensorSpec
from modelhostd.worker.tensors import CONTENTS_FIELD, DATATYPES, MAX_BYTES_ELEMENTS

ANY = Signature()

NUMERIC = {
    "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip


def parse(request, signature=ANY, name="m", version=3):
    """Parse an encoded or unencoded request."""
    payload = request if isinstance(request, bytes) else request.SerializeToString()
    return oip.parse(payload, name=name, version=version, signature=signature)


def refused(request, *, field, text="", signature=ANY):
    """Assert that a request is refused for this field; return the error."""
    with pytest.raises(ModelhostError) as caught:
        parse(request, signature)
    error = caught.value
    assert error.reason is Reason.INVALID_ARGUMENT
    assert error.metadata.keys() == {"field", "expected", "actual"}
    assert error.metadata["field"] == field
    assert text in error.message
    return error


def raw_request(datatype="FP32", shape=(2,), raw=bytes(8), name="x"):
    """Return a request with one raw input."""
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)
    return request


shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@given(st.data(), st.sampled_from(sorted(NUMERIC)))
def test_what_another_client_encodes_is_what_is_read(data, datatype):
    """Arrays that tritonclient puts on the wire are read bit for bit, and written so that it reads them."""
    array = data.draw(arrays.arrays(NUMERIC[datatype], shapes))
    tensor = triton.InferInput("x", list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    request = raw_request(datatype, array.shape, tensor._get_content() or b"")
    parsed = parse(request)
    read = parsed.inputs["x"]
    assert read.datatype == datatype
    assert read.array.shape == array.shape
    assert read.array.tobytes() == array.tobytes()
    encoded = oip.Response(parsed, 3, parsed.inputs).to_bytes()
    result = triton.InferResult(triton.service_pb2.ModelInferResponse.FromString(encoded))
    assert result.as_numpy("x").tobytes() == array.tobytes()


@given(arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4), st.data())
def test_byte_strings_come_through(shape, data):
    """BYTES tensors of any bytes and shape are read and written back the same."""
    count = int(np.prod(shape))
    elements = data.draw(st.lists(st.binary(max_size=20), min_size=count, max_size=count))
    raw = b"".join(struct.pack("<I", len(element)) + element for element in elements)
    parsed = parse(raw_request("BYTES", shape, raw))
    assert parsed.inputs["x"].array.shape == tuple(shape)
    assert parsed.inputs["x"].array.reshape(-1).tolist() == elements
    response = pb.ModelInferResponse.FromString(oip.Response(parsed, 3, parsed.inputs).to_bytes())
    assert list(response.raw_output_contents) == [raw]


def test_bfloat16_is_its_bits():
    """BF16 has no numpy type: it is read and written as its two bytes."""
    raw = struct.pack("<3H", 0x3F80, 0xC000, 0x7F80)
    parsed = parse(raw_request("BF16", (3,), raw))
    assert parsed.inputs["x"].array.dtype == np.uint16
    response = oip.Response(parsed, 3, {"y": Tensor("BF16", parsed.inputs["x"].array)})
    message = pb.ModelInferResponse.FromString(response.to_bytes())
    assert message.outputs[0].datatype == "BF16"
    assert message.raw_output_contents[0] == raw


TYPED = {
    "BOOL": [True, False], "INT8": [-128, 127], "INT16": [-32768, 32767], "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1], "UINT8": [0, 255], "UINT16": [0, 65535], "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1], "FP32": [1.5, -2.0], "FP64": [1e300, 0.1], "BYTES": [b"", b"\xff\x00"],
}  # fmt: skip


@pytest.mark.parametrize("datatype", sorted(TYPED))
def test_typed_contents_of_every_datatype_are_read(datatype):
    """Extremes of each datatype arrive from the field that the protocol gives it."""
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    getattr(tensor.contents, CONTENTS_FIELD[datatype]).extend(TYPED[datatype])
    read = parse(request).inputs["x"].array
    assert read.shape == (1, 2)
    assert read.reshape(-1).tolist() == TYPED[datatype]


def test_every_datatype_of_the_protocol_is_known():
    """The table holds the fourteen names of the protocol, and contents for all but two."""
    assert set(DATATYPES) == {*NUMERIC, "BF16", "BYTES"}
    assert set(DATATYPES) - set(CONTENTS_FIELD) == {"FP16", "BF16"}


@pytest.mark.parametrize(
    ("datatype", "values"), [("INT8", [128]), ("UINT8", [256]), ("INT16", [-40000])], ids=str
)
def test_typed_contents_out_of_range_are_refused(datatype, values):
    """A number that its datatype cannot hold is refused, not wrapped."""
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[1])
    getattr(tensor.contents, CONTENTS_FIELD[datatype]).extend(values)
    refused(request, field="inputs[x].contents")


REFUSALS = {
    "short": (raw_request(raw=bytes(7)), "raw_input_contents[x]", "Expected 8, got 7"),
    "long": (raw_request(raw=bytes(9)), "raw_input_contents[x]", "input byte size mismatch"),
    "negative": (raw_request(shape=(-1,)), "inputs[x].shape", "negative"),
    "overflow": (raw_request(shape=(2**62, 2**62)), "inputs[x].shape", ""),
    "overflow to 0": (raw_request(shape=(2**32, 2**32), raw=b""), "inputs[x].shape", ""),
    "huge beside 0": (raw_request(shape=(0, 2**62, 2**62), raw=b""), "inputs[x].shape", ""),
    "rank": (raw_request(shape=(1,) * 9), "inputs[x].shape", "9 dimensions"),
    "datatype": (raw_request(datatype="FP8"), "inputs[x].datatype", "FP8"),
    "no datatype": (raw_request(datatype=""), "inputs[x].datatype", ""),
    "no name": (raw_request(name=""), "inputs.name", ""),
    "long name": (raw_request(name="x" * 257), "inputs.name", "257"),
    "elements": (raw_request("BYTES", (MAX_BYTES_ELEMENTS + 1,), b""), "inputs[x].shape", ""),
    "cut length": (raw_request("BYTES", (1,), b"\1\0\0"), "raw_input_contents[x]", "element 0"),
    "cut bytes": (raw_request("BYTES", (1,), b"\xff\xff\xff\xff"), "raw_input_contents[x]", ""),
    "left over": (raw_request("BYTES", (1,), b"\0\0\0\0x"), "raw_input_contents[x]", "left over"),
}


@pytest.mark.parametrize("case", sorted(REFUSALS))
def test_a_tensor_that_does_not_add_up_is_refused(case):
    """Lengths, shapes, names and datatypes are checked, in numbers that do not overflow."""
    request, field, text = REFUSALS[case]
    refused(request, field=field, text=text)


def test_the_rules_of_contents_and_raw_contents():
    """Both, neither, too many and too few are told in the words that clients know."""
    request = raw_request()
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    refused(
        request,
        field="inputs[x].contents",
        text="contents field must not be specified when using raw_input_contents for 'x' for model 'm'",
    )
    request = raw_request()
    request.inputs.add(name="y", datatype="FP32", shape=[1])
    refused(
        request,
        field="inputs[y]",
        text="unable to find data for input tensor 'y' for model 'm' in request.",
    )
    request = raw_request()
    request.raw_input_contents.append(b"")
    refused(request, field="raw_input_contents", text="expected 1 raw_input_contents")
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP16", shape=[1]).contents.fp32_contents.append(1)
    refused(request, field="inputs[x].contents", text="raw_input_contents")
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="INT32", shape=[1]).contents.fp32_contents.append(1)
    refused(request, field="inputs[x].contents", text="int_contents")
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="INT32", shape=[3]).contents.int_contents.append(1)
    refused(request, field="inputs[x].contents", text="Expected 3, got 1")


def test_names_are_said_once():
    """Duplicate inputs and outputs, and outputs that do not exist, are refused."""
    request = raw_request()
    request.inputs.add(name="x", datatype="FP32", shape=[2])
    request.raw_input_contents.append(bytes(8))
    refused(request, field="inputs", text="input 'x' already exists in request")
    request = raw_request()
    request.outputs.add(name="x")
    request.outputs.add(name="x")
    refused(request, field="outputs", text="output 'x' already exists in request")
    request = raw_request()
    request.outputs.add(name="nope")
    refused(request, field="outputs", text="unexpected inference output 'nope' for model 'm'")


def test_counts_are_bounded():
    """More tensors, fields or bytes beside the raw contents than the limits are refused."""
    request = pb.ModelInferRequest(model_name="m")
    for number in range(65):
        request.inputs.add(name=str(number), datatype="FP32", shape=[0])
        request.raw_input_contents.append(b"")
    refused(request, field="inputs", text="at most 64")
    refused(b"\x3a\x00" * 2_000_000, field="request", text="1024")
    request = pb.ModelInferRequest(model_name="m", id="x" * (fields.MAX_STRUCTURE_BYTES + 1))
    refused(request, field="inputs", text="raw_input_contents")


def test_parameters_pass_through_and_reserved_ones_do_not():
    """Custom parameters reach the backend with their types; unknown triton_ ones are refused."""
    request = raw_request()
    request.parameters["flag"].bool_param = True
    request.parameters["count"].int64_param = -5
    request.parameters["rate"].double_param = 0.5
    request.parameters["word"].string_param = "hm"
    request.parameters["big"].uint64_param = 2**63
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    parameters = parse(request).parameters
    assert parameters["flag"] is True
    assert (parameters["count"], parameters["rate"]) == (-5, 0.5)
    assert (parameters["word"], parameters["big"]) == ("hm", 2**63)
    request.parameters["triton_mystery"].bool_param = True
    refused(request, field="parameters[triton_mystery]")


def test_a_parameter_that_means_nothing_to_the_model_is_refused():
    """A typing error would else be served as if nothing had been asked; what the worker acts on goes with any model."""
    for known, sent in ((frozenset(), "truncate"), (frozenset({"truncate"}), "truncat")):
        signature = Signature(parameters=known)
        request = raw_request()
        request.parameters["timeout"].int64_param = 10**6
        request.parameters["priority"].uint64_param = 1
        parse(request, signature=signature)
        request.parameters[sent].bool_param = True
        refused(request, field=f"parameters[{sent}]", signature=signature, text=f"'{sent}'")


@pytest.mark.parametrize("place", ["inputs", "outputs"])
def test_shared_memory_is_refused(place):
    """A region is refused where it is asked for, not ignored."""
    request = raw_request()
    item = request.inputs[0] if place == "inputs" else request.outputs.add(name="x")
    item.parameters["shared_memory_region"].string_param = "region"
    refused(request, field=f"{place}[x].parameters", text="Unable to find shared memory region")


def test_the_route_is_checked_against_the_whole_message():
    """The last of several names counts, and another version than the loaded one is not found."""
    assert parse(pb.ModelInferRequest(model_name="m", model_version="3")).model_name == "m"
    first = pb.ModelInferRequest(model_name="m").SerializeToString()
    second = pb.ModelInferRequest(model_name="other").SerializeToString()
    refused(first + second, field="model_name")
    assert parse(second + first).model_name == "m"
    with pytest.raises(ModelhostError) as caught:
        parse(pb.ModelInferRequest(model_name="m", model_version="7"))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    assert "Request for unknown model: 'm' version 7 is not found" in caught.value.message


def test_one_of_several_signatures_is_enough():
    """Alternatives are tried in turn; where none fits, the error is of the one that comes nearest."""
    signature = Signature(
        inputs=(TensorSpec("text", "BYTES", (-1,)),),
        alternatives=(
            (TensorSpec("text", "BYTES", (-1, 1)),),
            (
                TensorSpec("ids", "INT64", (-1, -1)),
                TensorSpec("mask", "INT64", (-1, -1), optional=True),
            ),
        ),
        batched=True,
    )
    element = b"\1\0\0\0a"
    assert parse(raw_request("BYTES", (2,), element * 2, "text"), signature).item_count == 2
    assert parse(raw_request("BYTES", (1, 1), element, "text"), signature).item_count == 1
    ids = raw_request("INT64", (1, 2), bytes(16), "ids")
    assert parse(ids, signature).item_count == 1
    ids.inputs.add(name="mask", datatype="INT64", shape=[2, 1])
    ids.raw_input_contents.append(bytes(16))
    refused(ids, field="inputs[mask].shape", signature=signature, text="2 items")
    wrong = raw_request("BYTES", (1, 1, 1), element, "text")
    refused(wrong, field="inputs[text].shape", signature=signature)
    wrong = raw_request("INT32", (1, 2), bytes(8), "ids")
    refused(wrong, field="inputs[ids].datatype", signature=signature, text="expects 'INT64'")
    refused(raw_request(name="q"), field="inputs", signature=signature, text="'q'")
    nothing = raw_request()
    del nothing.inputs[:], nothing.raw_input_contents[:]
    refused(nothing, field="inputs", signature=signature, text="1 inputs but got 0 inputs")


def test_who_sends_what_is_optional_alone_is_told_what_is_missing():
    """Of the first set that has the names, and it is not counted among what came."""
    stream = TensorSpec("stream", "BOOL", (1,), optional=True)
    first, second = (TensorSpec(name, "BYTES", (1,)) for name in ("text", "messages"))
    signature = Signature(
        inputs=(first, stream), outputs=(), alternatives=((second, stream),), batched=False
    )
    alone = raw_request("BOOL", (1,), b"\1", "stream")
    told = "1 inputs but got 0 inputs for model 'm'. Missing: 'text'"
    refused(alone, field="inputs", signature=signature, text=told)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_read(payload):
    """Whatever the bytes, the answer is a parsed request or a typed error."""
    try:
        parse(payload)
    except ModelhostError as error:
        assert error.reason in (Reason.INVALID_ARGUMENT, Reason.MODEL_NOT_FOUND)  # noqa: PT017


@given(st.data())
def test_mutated_requests_are_refused_or_read(data):
    """Flipped, cut and doubled parts of a good request end in a typed error or a checked request."""
    request = raw_request()
    request.inputs.add(name="t", datatype="BYTES", shape=[2])
    request.raw_input_contents.append(b"\1\0\0\0a\2\0\0\0bc")
    request.parameters["p"].int64_param = 1
    payload = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, max(0, len(payload) - 1)))
        match data.draw(st.sampled_from(["flip", "cut", "double", "insert"])):
            case "flip" if payload:
                payload[where] ^= data.draw(st.integers(1, 255))
            case "cut":
                del payload[where:]
            case "double":
                payload += payload[where:]
            case _:
                payload[where:where] = data.draw(st.binary(max_size=12))
    try:
        parsed = parse(bytes(payload))
    except ModelhostError as error:
        assert error.reason in (Reason.INVALID_ARGUMENT, Reason.MODEL_NOT_FOUND)  # noqa: PT017
        return
    for tensor in parsed.inputs.values():
        assert tensor.datatype in DATATYPES


@given(st.binary(max_size=300))
def test_splitting_off_the_raw_contents_changes_nothing(payload):
    """The hand-written scan sees the same message as protobuf: structure and raw contents agree."""
    try:
        whole = pb.ModelInferRequest.FromString(payload)
    except Exception:
        return
    try:
        structure, raw = fields.split(payload)
    except ModelhostError:
        # Groups: protobuf skips them, no client sends them.
        assert any(payload[i] & 7 in (3, 4) for i in range(len(payload)))
        return
    rest = pb.ModelInferRequest.FromString(structure)
    assert [bytes(view) for view in raw] == list(whole.raw_input_contents)
    del whole.raw_input_contents[:]
    assert rest == whole


def test_large_tensors_are_views_not_copies():
    """A tensor's array lies in the memory that the request came in."""
    payload = bytearray(raw_request("FP32", (16384,), bytes(65536)).SerializeToString())
    parsed = oip.parse(memoryview(payload), name="m", version=3, signature=ANY)
    payload[-4:] = struct.pack("<f", 7)
    assert parsed.inputs["x"].array[-1] == 7


def test_only_wanted_outputs_are_sent_in_their_order():
    """Requested outputs come in the order of the request; a backend that lacks one is a bug of its own."""
    signature = Signature(outputs=(TensorSpec("a", "FP32", (1,)), TensorSpec("b", "FP32", (1,))))
    request = pb.ModelInferRequest(model_name="m", id="9")
    request.outputs.add(name="b")
    parsed = parse(request, signature)
    outputs = {"a": np.zeros(1, np.float32), "b": np.ones(1, np.float32)}
    message = pb.ModelInferResponse.FromString(oip.Response(parsed, 3, outputs).to_bytes())
    assert [output.name for output in message.outputs] == ["b"]
    assert (message.id, message.model_name, message.model_version) == ("9", "m", "3")
    with pytest.raises(KeyError):
        oip.Response(parsed, 3, {"a": outputs["a"]})
    for nonsense in (np.zeros(1, np.complex128), Tensor("FP32", np.zeros(1))):
        with pytest.raises(TypeError):
            oip.Response(parsed, 3, {"b": nonsense})
