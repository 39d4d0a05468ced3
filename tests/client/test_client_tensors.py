"""Arrays to the wire and back, held against the encoder of an existing client."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient import utils as triton
from tritonclient.grpc import InferInput

from modelhost import Internal, InvalidArgument, _tensors
from modelhost.oip import open_inference_pb2 as oip

NUMPY = {
    "BOOL": np.bool_,
    **{f"INT{b}": np.dtype(f"i{b // 8}") for b in (8, 16, 32, 64)},
    **{f"UINT{b}": np.dtype(f"u{b // 8}") for b in (8, 16, 32, 64)},
    **{f"FP{b}": np.dtype(f"f{b // 8}") for b in (16, 32, 64)},
}
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
TEXTS = st.binary(max_size=12) | st.text(max_size=6)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal bit by bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def triton_encodes(array: np.ndarray, datatype: str) -> bytes:
    tensor = InferInput("x", list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor._get_content() or b""


@pytest.mark.parametrize("datatype", NUMPY)
def test_every_numeric_datatype_comes_back_as_it_went(datatype) -> None:
    """Any array of the datatype's dtype, of any shape, is encoded as tritonclient does and decoded equal."""

    @given(array=hnp.arrays(NUMPY[datatype], SHAPES))
    def check(array: np.ndarray) -> None:
        named, raw = _tensors.encode("x", array)
        assert named == datatype
        assert raw == triton_encodes(array, datatype)
        assert same(_tensors.decode("x", datatype, array.shape, raw), array)

    check()


@given(array=hnp.arrays(object, SHAPES, elements=TEXTS))
def test_bytes_come_back_as_they_went(array) -> None:
    """Bytes and strings are encoded as tritonclient does, and come back as bytes."""
    named, raw = _tensors.encode("x", array)
    assert named == "BYTES"
    assert raw == triton_encodes(array, "BYTES")
    back = _tensors.decode("x", "BYTES", array.shape, raw)
    assert back.shape == array.shape
    wanted = [e.encode() if isinstance(e, str) else e for e in array.ravel().tolist()]
    assert back.ravel().tolist() == wanted


@given(array=hnp.arrays(np.float32, SHAPES))
def test_bf16_is_rounded_as_by_its_own_type(array) -> None:
    """float32 sent as BF16 has the bits of ml_dtypes' rounding, and comes back as float32 of that value."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with np.errstate(all="ignore"):
        exact = array.astype(ml_dtypes.bfloat16)
    # What only rounding makes infinite is refused.
    assume(np.array_equal(np.isinf(exact.astype(np.float32)), np.isinf(array)))
    named, raw = _tensors.encode("x", array, "BF16")
    back = _tensors.decode("x", named, array.shape, raw)
    nan = np.isnan(array)
    assert np.array_equal(np.isnan(back), nan)
    assert np.array_equal(back[~nan], exact.astype(np.float32)[~nan])
    assert back.dtype == np.float32
    assert _tensors.encode("x", exact) == ("BF16", exact.tobytes())
    assert triton_encodes(exact, "BF16") == exact.tobytes()


@given(array=hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=3)))
def test_memory_order_does_not_matter(array) -> None:
    """Transposed, strided and big-endian arrays are sent row-major and little-endian."""
    for view in (array.T, array[::2], np.asfortranarray(array), array.astype(">i4")):
        named, raw = _tensors.encode("x", view)
        assert named == "INT32"
        assert np.array_equal(_tensors.decode("x", "INT32", view.shape, raw), view)


ANY_DTYPE = (
    hnp.scalar_dtypes()
    | hnp.byte_string_dtypes()
    | hnp.unicode_string_dtypes()
    | hnp.array_dtypes()
)


@given(
    array=hnp.arrays(ANY_DTYPE, SHAPES),
    datatype=st.sampled_from(["", *_tensors.DATATYPES]),
)
def test_any_array_is_sent_as_it_is_or_refused(array, datatype) -> None:
    """Whatever its dtype and the datatype that is named: InvalidArgument, or what comes back equals it."""
    array.flags.writeable = False
    with np.errstate(all="ignore"):
        try:
            named, raw = _tensors.encode("x", array, datatype)
        except InvalidArgument:
            return
    back = _tensors.decode("x", named, array.shape, raw)
    assert back.shape == array.shape
    if array.dtype.kind in "iub":
        assert np.array_equal(back, array)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"x": [[1], [2, 3]]}, "inputs[x]"),
        ({"x": ["\ud800"]}, "inputs[x]"),
        ({"x": 2**70}, "inputs[x]"),
    ],
    ids=["ragged", "half a character", "above 64 bits"],
)
def test_lists_that_are_no_array_are_refused(inputs, field) -> None:
    """What numpy makes no tensor of is InvalidArgument that names the input."""
    with pytest.raises(InvalidArgument) as caught:
        _tensors.infer_request("m", inputs)
    assert caught.value.metadata["field"] == field


def test_an_array_that_masks_elements_is_refused() -> None:
    """What lies under a mask is no value: it is not sent as if it were. One that masks nothing is an array."""
    masked = np.ma.masked_equal([1.0, -9.0, -9.0], -9.0)
    with pytest.raises(InvalidArgument, match=r"inputs\[x\]: expected .*filled.*, got 2 masked"):
        _tensors.infer_request("m", {"x": masked})
    request = _tensors.infer_request("m", {"x": np.ma.array([1.0, 2.0])})
    assert request.raw_input_contents[0] == np.array([1.0, 2.0]).tobytes()


@pytest.mark.parametrize(
    ("array", "datatype"),
    [
        (np.array([1.0, 70000.0]), "FP16"),
        (np.array([-1e300]), "FP32"),
        (np.array([1e300]), "BF16"),
        (np.array(1e300), "BF16"),
        (np.array([0, -3.4e38], dtype=np.float32), "BF16"),
    ],
)
def test_a_number_does_not_become_infinite(array, datatype) -> None:
    """One that the named datatype cannot hold is refused; what is infinite, or none, is sent as it is."""
    with pytest.raises(InvalidArgument, match=f"numbers that {datatype} can hold"):
        _tensors.encode("x", array, datatype)
    odd = np.array([np.inf, -np.inf, np.nan])
    back = _tensors.decode("x", datatype, (3,), _tensors.encode("x", odd, datatype)[1])
    assert np.array_equal(back, odd, equal_nan=True)


def test_whole_numbers_take_a_datatype_that_holds_them() -> None:
    """A list of small numbers may be sent as any whole datatype; one that would arrive as another is refused with its range."""
    assert _tensors.encode("x", np.array([0, 255]), "UINT8") == ("UINT8", b"\0\xff")
    for datatype in ("INT8", "UINT8"):
        with pytest.raises(InvalidArgument, match="-1 to 300"):
            _tensors.encode("x", np.array([-1, 300]), datatype)
    # The first one that FP32, of 24 bits, would round to another.
    assert _tensors.encode("x", np.array([2**24]), "FP32")[0] == "FP32"
    with pytest.raises(InvalidArgument, match="numbers that FP32 can hold"):
        _tensors.encode("x", np.array([0, 2**24 + 1]), "FP32")


def test_a_request_is_read_by_an_existing_client() -> None:
    """A whole request has names, shapes, parameters and raw contents where tritonclient has them."""
    request = _tensors.infer_request(
        "m",
        {"a": [[1.5, 2.0]], "t": ["x", "yz"]},
        outputs=["o"],
        version="3",
        datatypes={"a": "FP32"},
        parameters={"b": True, "i": 7, "f": 0.5, "s": "w"},
        request_id="r",
    )
    assert (request.model_name, request.model_version, request.id) == ("m", "3", "r")
    assert [(i.name, i.datatype, list(i.shape)) for i in request.inputs] == [
        ("a", "FP32", [1, 2]),
        ("t", "BYTES", [2]),
    ]
    assert request.raw_input_contents[0] == np.array([1.5, 2.0], "<f4").tobytes()
    assert triton.deserialize_bytes_tensor(request.raw_input_contents[1]).tolist() == [b"x", b"yz"]
    assert [o.name for o in request.outputs] == ["o"]
    assert request.parameters["b"].bool_param is True
    assert request.parameters["i"].int64_param == 7
    assert request.parameters["f"].double_param == 0.5
    assert request.parameters["s"].string_param == "w"


@pytest.mark.parametrize(
    ("inputs", "datatypes", "field"),
    [
        ({"x": np.zeros(1, complex)}, {}, "inputs[x]"),
        ({"x": np.zeros(1, "M8[s]")}, {}, "inputs[x]"),
        ({"x": np.array([object()])}, {}, "inputs[x]"),
        ({"x": [1.5]}, {"x": "INT32"}, "inputs[x]"),
        ({"x": [1]}, {"x": "BYTES"}, "inputs[x]"),
        ({"x": [1]}, {"x": "BF16"}, "inputs[x]"),
        ({"x": [1]}, {"x": "FP8"}, "datatypes[x]"),
        ({"x": [1]}, {"y": "FP32"}, "datatypes"),
    ],
    ids=["complex", "date", "object", "lossy", "number", "integer", "unknown", "stray"],
)
def test_what_no_datatype_holds_is_refused(inputs, datatypes, field) -> None:
    """An array that cannot be sent is InvalidArgument that names the input, before any call."""
    with pytest.raises(InvalidArgument) as caught:
        _tensors.infer_request("m", inputs, datatypes=datatypes)
    assert caught.value.metadata["field"] == field


def test_a_parameter_beyond_64_bits_is_refused() -> None:
    """An integer that the wire cannot hold, or what is none of its types, is InvalidArgument."""
    for value in (-(2**63) - 1, 2**64, 10**5000, None, b"x", "\ud800", [1]):
        with pytest.raises(InvalidArgument, match=r"parameters\[p\]"):
            _tensors.infer_request("m", {}, parameters={"p": value})


def test_a_parameter_of_64_bits_without_a_sign_is_sent_as_one() -> None:
    """An integer that only uint64 holds goes as that, every other one as int64, which existing servers know."""
    for value, field in ((2**63, "uint64_param"), (2**64 - 1, "uint64_param"), (2**63 - 1, "int64_param")):  # fmt: skip
        slot = _tensors.infer_request("m", {}, parameters={"p": value}).parameters["p"]
        assert slot.WhichOneof("parameter_choice") == field
        assert getattr(slot, field) == value


@pytest.mark.parametrize(
    "texts", ["one", b"one", [], ["a", 1]], ids=["str", "bytes", "none", "mixed"]
)
def test_texts_are_a_list_of_strings(texts) -> None:
    """One bare string would be taken apart into letters: it is refused, like an empty list."""
    with pytest.raises(InvalidArgument):
        _tensors.text_array(texts)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [
        ("FP32", [2], b"1234"),
        ("FP32", [-1], b""),
        ("FP32", [2**40, 2**40], b""),
        ("BYTES", [-1, -1], b"\x01\x00\x00\x00a"),
        ("FP8", [1], b"1"),
        ("BYTES", [1], b"\x05\x00\x00\x00ab"),
        ("BYTES", [1], b"\x05\x00"),
        ("BYTES", [2], b"\x01\x00\x00\x00a"),
    ],
    ids=["short", "negative", "huge", "twice negative", "unknown", "cut", "cut length", "too few"],
)
def test_an_answer_that_is_none_is_internal(datatype, shape, raw) -> None:
    """Bytes that do not fit datatype and shape are never turned into an array."""
    response = oip.ModelInferResponse(raw_output_contents=[raw])
    response.outputs.add(name="o", datatype=datatype, shape=shape)
    with pytest.raises(Internal):
        _tensors.infer_result(response)


def test_outputs_without_contents_are_internal() -> None:
    """Outputs and raw contents come in pairs."""
    response = oip.ModelInferResponse()
    response.outputs.add(name="o", datatype="FP32", shape=[1])
    with pytest.raises(Internal):
        _tensors.infer_result(response)
