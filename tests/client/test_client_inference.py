"""Inference through the client: arrays out, arrays in."""

import numpy as np
import pytest

from modelhost import Classification, InvalidArgument
from modelhost.oip import open_inference_pb2 as oip
from tests.client.double import Double


def answer_with(**arrays: np.ndarray):
    response = oip.ModelInferResponse(model_name="m")
    for name, array in arrays.items():
        response.outputs.add(name=name, datatype="FP32", shape=array.shape)
        response.raw_output_contents.append(array.astype("<f4").tobytes())
    return response


def test_infer_sends_and_returns_arrays(double: Double, both) -> None:
    """Arrays go out under their names, and come back under theirs."""
    double.on("ModelInfer", answer_with(y=np.ones((2, 3))))
    outputs = both(
        lambda c: c.infer("models/m", {"x": np.zeros(2, np.int64)}, outputs=["y"], version=4)
    )
    assert list(outputs) == ["y"]
    assert outputs["y"].shape == (2, 3)
    assert not outputs["y"].flags.writeable
    (sent,) = double.requests("ModelInfer")
    assert (sent.model_name, sent.model_version) == ("m", "4")
    assert sent.inputs[0].datatype == "INT64"


def test_large_messages_go_both_ways(double: Double, both) -> None:
    """Tensors far beyond gRPC's default limit of 4 MiB pass."""
    array = np.arange(6 * 1024 * 1024, dtype=np.float32)

    def echo(request, context):
        return oip.ModelInferResponse(
            outputs=[
                oip.ModelInferResponse.InferOutputTensor(
                    name="x", datatype="FP32", shape=array.shape
                )
            ],
            raw_output_contents=request.raw_input_contents,
        )

    double.on("ModelInfer", echo)
    assert np.array_equal(both(lambda c: c.infer("m", {"x": array}))["x"], array)


def test_embed_returns_a_matrix(double: Double, both) -> None:
    """Texts become a float32 matrix of one row per text."""
    double.on("ModelInfer", answer_with(embedding=np.ones((2, 3))))
    matrix = both(lambda c: c.embed("m", ["a", "é"]))
    assert matrix.shape == (2, 3)
    assert matrix.dtype == np.float32
    (sent,) = double.requests("ModelInfer")
    assert sent.raw_input_contents[0] == b"\x01\x00\x00\x00a\x02\x00\x00\x00\xc3\xa9"
    assert (sent.inputs[0].name, sent.inputs[0].datatype, list(sent.inputs[0].shape)) == (
        "text",
        "BYTES",
        [2],
    )


@pytest.mark.parametrize("outputs", [{"y": np.ones(2)}, {"embedding": np.ones((1, 3))}])
def test_embed_refuses_what_is_no_embedding(double: Double, both, outputs) -> None:
    """A model that answers otherwise is told by what came."""
    double.on("ModelInfer", answer_with(**outputs))
    with pytest.raises(InvalidArgument, match="feature-extraction"):
        both(lambda c: c.embed("m", ["a", "b"]))


def test_classify_returns_labels_and_scores(double: Double, both) -> None:
    """Each text gets its best label with its score, and the scores of all classes."""
    response = answer_with(scores=np.array([[0.25, 0.75], [0.5, 0.5]]))
    response.outputs.add(name="label", datatype="BYTES", shape=[2])
    response.raw_output_contents.append(b"\x03\x00\x00\x00bad\x04\x00\x00\x00good")
    double.on("ModelInfer", response)
    assert both(lambda c: c.classify("m", ["a", "b"])) == [
        Classification("bad", 0.75, (0.25, 0.75)),
        Classification("good", 0.5, (0.5, 0.5)),
    ]


def test_classify_refuses_what_is_no_classifier(double: Double, both) -> None:
    """A model that answers otherwise is told by what came."""
    double.on("ModelInfer", answer_with(embedding=np.ones((1, 3))))
    with pytest.raises(InvalidArgument, match="text-classification"):
        both(lambda c: c.classify("m", ["a"]))


def test_ready_and_health(double: Double, both) -> None:
    """Readiness of a model and health of a service are the standard protocols' answers."""
    double.on("ModelReady", oip.ModelReadyResponse(ready=True))
    assert both(lambda c: c.ready("m")) is True
    assert both(lambda c: c.health("modelhost.v1.ModelService")) == "SERVING"
    assert double.requests("Check") == [b"\x0a\x19modelhost.v1.ModelService"]
    assert both(lambda c: c.health()) == "SERVING"
