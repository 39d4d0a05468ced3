"""The classification extension: the highest elements of an output as texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from modelhost.oip import open_inference_pb2 as pb
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker import oip
from modelhostd.worker.backend import BadInputError, InferContext, Signature, Tensor, TensorSpec
from modelhostd.worker.classification import Top, classify
from tests.worker.bert import CLASSIFICATION, byte_strings, load

MAX = float(np.finfo(np.float32).max)
SIGNATURE = Signature(
    inputs=(TensorSpec("x", "FP32", (-1, 3)),),
    outputs=(TensorSpec("y", "FP32", (-1, 3), labels=("low", "mid")), TensorSpec("z", "FP32", (-1,))),
    batched=True,
)  # fmt: skip


def texts(tensor):
    """Return the texts of a BYTES tensor."""
    assert tensor.datatype == "BYTES"
    return [[one.decode() for one in row] for row in np.atleast_2d(tensor.array).tolist()]


def parse(count, output="y"):
    """Parse a request for the top of an output."""
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"\0" * 12])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    parameter = request.outputs.add(name=output).parameters["classification"]
    if isinstance(count, str):
        parameter.string_param = count
    else:
        parameter.int64_param = count
    encoded = request.SerializeToString()
    return oip.parse(encoded, name="m", version=1, signature=SIGNATURE)


def test_the_highest_come_first_with_index_and_label():
    """Value, index and, where there is one, label; of each item by itself; no more than there are."""
    rows = Tensor("FP32", np.array([[0.25, 0.5, 0.75], [3, 2, 1]], np.float32))
    top = Top(2, ("low", "mid"), batched=True)
    assert texts(classify("y", rows, top)) == [
        ["0.750000:2", "0.500000:1:mid"],
        ["3.000000:0:low", "2.000000:1:mid"],
    ]
    assert classify("y", rows, Top(9, batched=True)).array.shape == (2, 3)
    assert classify("y", rows, Top(1)).array.tolist() == [b"3.000000:3"]


def test_a_response_holds_it_in_place_of_the_tensor():
    """The output keeps its name; others are sent as they are."""
    answer = {"y": np.array([[1, 5, 3]], np.float32), "z": np.zeros(1, np.float32)}
    response = pb.ModelInferResponse.FromString(oip.Response(parse(2), 1, answer).to_bytes())
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", "BYTES", [1, 2])
    assert response.raw_output_contents[0][4:] == b"5.000000:1:mid" + b"\x0a\0\0\0" + b"3.000000:2"


@pytest.mark.parametrize("count", [0, -1, "3"])
def test_a_count_that_is_none_is_refused(count):
    """Output, expected and actual are named."""
    with pytest.raises(ModelhostError) as caught:
        parse(count)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == "outputs[y].classification"


def test_what_has_no_order_is_refused():
    """Texts and flags have no highest one; nor is there room for a million texts a request."""
    for datatype, array in (("BYTES", np.array([b"x"], object)), ("BOOL", np.array([True]))):
        with pytest.raises(BadInputError):
            classify("y", Tensor(datatype, array), Top(1))
    with pytest.raises(BadInputError):
        classify("y", Tensor("INT8", np.zeros((2, 10**6), np.int8)), Top(10**6, batched=True))


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP64", "INT64", "UINT8"])
def test_every_type_of_numbers(datatype):
    """Half precisions are read as what they are; integers have no point."""
    dtype = {"FP16": "f2", "BF16": "u2", "FP64": "f8", "INT64": "i8", "UINT8": "u1"}[datatype]
    array = np.array([0x3F80, 0x4000], dtype) if datatype == "BF16" else np.array([1, 2], dtype)
    first = texts(classify("y", Tensor(datatype, array), Top(1)))[0][0]
    assert first == ("2:1" if datatype in ("INT64", "UINT8") else "2.000000:1")


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 20)),
                  elements=st.sampled_from([0.0, -0.0, 1.0, -2.5, MAX, -MAX, *map(float, ("nan", "inf", "-inf"))])),
    st.integers(1, 25),
)  # fmt: skip
def test_the_order_is_that_of_the_values(array, count):
    """Descending, equals by index, what is no number last, in the order of its indices, too."""
    got = texts(classify("y", Tensor("FP32", array), Top(count, batched=True)))
    for row, values in zip(got, array.tolist(), strict=True):
        keys = [
            (value != value, -value if value == value else 0, n) for n, value in enumerate(values)
        ]
        assert [int(text.split(":")[1]) for text in row] == [n for *_, n in sorted(keys)][:count]


@given(
    st.sampled_from(["i1", "u1", "i8", "u8"]).flatmap(
        lambda dtype: arrays.arrays(dtype, st.integers(1, 20))),
    st.integers(1, 25),
)  # fmt: skip
def test_the_order_of_integers(array, count):
    """Descending, equals by index; also of the lowest and highest ones, with and without a sign."""
    datatype = {"i": "INT", "u": "UINT"}[array.dtype.kind] + str(8 * array.dtype.itemsize)
    (row,) = texts(classify("y", Tensor(datatype, array), Top(count)))
    ranked = sorted((-value, n) for n, value in enumerate(array.tolist()))[:count]
    assert row == [f"{-value}:{n}" for value, n in ranked]


def test_only_the_highest_are_ordered(monkeypatch):
    """Of a large output few elements are sorted: all of 15 million took 18 s."""
    ordered = []

    def watched(keys, **options):
        ordered.append(len(keys))
        return argsort(keys, **options)

    argsort = np.argsort
    monkeypatch.setattr(np, "argsort", watched)
    array = np.arange(10_000, dtype=np.float32)
    assert texts(classify("y", Tensor("FP32", array), Top(2))) == [
        ["9999.000000:9999", "9998.000000:9998"]
    ]
    assert ordered == [2]


def test_an_output_without_items_has_no_highest():
    """Neither where it has no items, nor where an item has no elements."""
    for shape in ((0, 3), (2, 0)):
        top = classify("y", Tensor("FP32", np.zeros(shape, np.float32)), Top(2, batched=True))
        assert top.array.size == 0


def test_a_classifier_names_its_classes(classifier):
    """The real backend's scores carry the labels of the model's files."""
    backend = load(classifier, CLASSIFICATION)
    (spec,) = [one for one in backend.signature().outputs if one.name == "scores"]
    answer = backend.infer({"text": byte_strings(["a cat"])}, InferContext())
    top = classify("scores", Tensor("FP32", answer["scores"]), Top(1, spec.labels, batched=True))
    assert texts(top)[0][0].split(":")[2] == answer["label"][0].decode()
