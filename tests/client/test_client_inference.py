"""Inference through the client: arrays out, arrays in."""

import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from modelhost import AsyncClient, Client, Generation, InvalidArgument, Label
from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import inference_service_pb2 as pb
from tests.client.double import Double
from tests.support import DEADLINE_S


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


def refuse(context, details="'text' for model 'm' is not an input"):
    """Refuse a request as the worker does."""
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, details)


def test_embed_names_the_task_of_a_model_of_another(double: Double, both) -> None:
    """What the model makes of it is not the answer: task, expected and the next step are."""
    double.on("ModelInfer", lambda request, context: refuse(context))
    double.on("DescribeModel", pb.ModelDescription(task="text-generation"))
    with pytest.raises(InvalidArgument, match="task text-generation") as caught:
        both(lambda c: c.embed("m", ["a"]))
    assert caught.value.metadata == {
        "field": "model", "expected": "feature-extraction", "actual": "text-generation",
    }  # fmt: skip
    assert "modelhost show m" in caught.value.hint


def test_embed_leaves_other_refusals_as_they_are(double: Double, both) -> None:
    """A text that an embedding model refuses is told as the model says it, also where nothing more is known."""
    double.on("ModelInfer", lambda request, context: refuse(context))
    double.on("DescribeModel", pb.ModelDescription(task="feature-extraction"))
    with pytest.raises(InvalidArgument, match="not an input"):
        both(lambda c: c.embed("m", ["a"]))
    double.on("DescribeModel", lambda request, context: refuse(context, "nothing"))
    with pytest.raises(InvalidArgument, match="not an input"):
        both(lambda c: c.embed("m", ["a"]))


def test_why_embed_was_refused_is_asked_within_the_callers_time(double: Double, both) -> None:
    """The call that finds out the task has the caller's deadline, not the minutes of a first inference."""
    left: list[float] = []

    def describe(request, context):
        left.append(context.time_remaining())
        return pb.ModelDescription(task="text-generation")

    double.on("ModelInfer", lambda request, context: refuse(context))
    double.on("DescribeModel", describe)
    with pytest.raises(InvalidArgument, match="task text-generation"):
        both(lambda c: c.embed("m", ["a"], timeout=20.0))
    assert left[0] < 30.0


def test_version_and_priority_go_along(double: Double, both) -> None:
    """Each call by task says which version is asked for and how urgent it is."""
    double.on("ModelInfer", answer_with(embedding=np.ones((1, 3))))
    both(lambda c: c.embed("m", ["a"], version=2, priority=1))
    (sent,) = double.requests("ModelInfer")
    assert (sent.model_version, sent.parameters["priority"].int64_param) == ("2", 1)
    double.on("Classify", pb.ClassifyResponse())
    both(lambda c: c.classify("m", ["a"], version=2, priority=1))
    double.on("Generate", PIECES)
    both(lambda c: c.generate("m", "a", version=2, priority=1))
    for method in ("Classify", "Generate"):
        (sent,) = double.requests(method)
        assert (sent.version, sent.priority) == (2, 1)
    with pytest.raises(InvalidArgument, match="priority"):
        both(lambda c: c.generate("m", "a", priority=-1))


def test_classify_returns_labels_and_scores(double: Double, both) -> None:
    """Each text gets its likeliest labels with their scores and numbers, the best of them by itself."""
    response = pb.ClassifyResponse()
    response.classifications.add(
        labels=[{"name": "good", "score": 0.75, "index": 1}, {"name": "bad"}]
    )
    response.classifications.add(labels=[{"name": "bad", "score": 0.5}])
    double.on("Classify", response)
    first, second = both(lambda c: c.classify("m", ["a", "b"], top_k=2))
    assert first.labels == (Label("good", 0.75, 1), Label("bad", 0.0, 0))
    assert (first.label, first.score) == ("good", 0.75)
    assert second.label == "bad"
    assert double.requests("Classify") == [
        pb.ClassifyRequest(model="models/m", texts=["a", "b"], top_k=2)
    ]


@pytest.mark.parametrize("texts", ["one", [1]])
def test_classify_refuses_what_is_no_list_of_texts(both, texts) -> None:
    """One bare string would be one text for each letter."""
    with pytest.raises(InvalidArgument, match="texts"):
        both(lambda c: c.classify("m", texts))


STOP = pb.GenerateResponse.STOP
PIECES = [
    pb.GenerateResponse(text="a", input_token_count=3, output_token_count=1),
    pb.GenerateResponse(text="", input_token_count=3, output_token_count=2),
    pb.GenerateResponse(text="é", input_token_count=3, output_token_count=3, finish_reason=STOP),
]


def test_generate_returns_the_whole_text(double: Double, both) -> None:
    """With token counts and why it ended; parameters that are given go along, a prompt as it is."""
    double.on("Generate", PIECES)
    made = both(lambda c: c.generate("slots/m", "hi", max_tokens=5, temperature=0, stop="."))
    assert made == Generation("aé", "stop", 3, 3)
    (sent,) = double.requests("Generate")
    assert sent.whole_text
    assert sent.model == "models/m"
    assert sent.sampling == pb.SamplingParameters(max_tokens=5, temperature=0, stop=["."])
    assert sent.sampling.HasField("temperature")
    assert not sent.sampling.HasField("seed")


def test_generate_streams_pieces(double: Double, client: Client) -> None:
    """Pieces come as texts, empty ones left out; the result is known at any time, and whole at the end."""
    double.on("Generate", PIECES)
    said = [{"role": "user", "content": "hi"}]
    with client.generate("m", said, stream=True) as pieces:
        assert next(pieces) == "a"
        assert pieces.result == Generation("a", "", 3, 1)
        assert list(pieces) == ["é"]
        assert pieces.result == Generation("aé", "stop", 3, 3)
    assert double.requests("Generate")[0].messages[0].content == "hi"


async def test_generate_streams_pieces_to_asyncio(double: Double) -> None:
    """The asynchronous twin does the same."""
    double.on("Generate", PIECES)
    async with AsyncClient(double.target) as client:
        pieces = client.generate("m", "hi", stream=True)
        assert [piece async for piece in pieces] == ["a", "é"]
        assert pieces.result.finish_reason == "stop"
        assert (await client.generate("m", "hi")).text == "aé"


def test_a_closed_text_ends_the_work(double: Double, client: Client) -> None:
    """Leaving the block cancels the call, so that the daemon learns of it."""
    gone = threading.Event()

    def endless(request: object, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        context.add_callback(gone.set)
        yield PIECES[0]
        gone.wait(DEADLINE_S)

    double.on("Generate", endless)
    with client.generate("m", "hi", stream=True) as pieces:
        assert next(pieces) == "a"
    assert gone.wait(DEADLINE_S)
    assert list(pieces) == []
    assert pieces.result.text == "a"


@pytest.mark.parametrize(
    ("prompt", "sampling", "named"),
    [
        ("x", {"colour": 1}, "colour"),
        ("x", {"max_tokens": "many"}, "max_tokens"),
        ("x", {"seed": 2**70}, "seed"),
        ("x", {"stop": [1]}, "stop"),
        ([{"role": "user"}], {}, r"prompt\[0\]"),
        ([{"role": "user", "content": 1}], {}, r"prompt\[0\]"),
        ([{"role": "user", "content": "a", "more": "b"}], {}, r"prompt\[0\]"),
    ],
)
def test_generate_refuses_by_name(both, prompt, sampling, named: str) -> None:
    """What no request can hold is told before anything is sent."""
    with pytest.raises(InvalidArgument, match=named):
        both(lambda c: c.generate("m", prompt, **sampling))


def test_ready_and_health(double: Double, both) -> None:
    """Readiness of a model and health of a service are the standard protocols' answers."""
    double.on("ModelReady", oip.ModelReadyResponse(ready=True))
    assert both(lambda c: c.ready("m")) is True
    assert both(lambda c: c.health("modelhost.v1.ModelService")) == "SERVING"
    assert double.requests("Check") == [b"\x0a\x19modelhost.v1.ModelService"]
    assert both(lambda c: c.health()) == "SERVING"
