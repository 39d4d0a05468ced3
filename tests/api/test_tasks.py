"""Embed, Classify and Generate over a host of fakes: what goes to the worker, and what comes back."""

import json
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import inference_service_pb2 as pb
from modelhost.v1.inference_service_pb2_grpc import InferenceServiceStub
from modelhostd.api.tasks import task_service
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.raw_tensors import pack_texts, unpack_texts
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import Source
from modelhostd.ports import LoadSpec, TensorSpec
from tests.api.oip_scene import OipScene, oip_scene
from tests.api.serving import serving
from tests.api.support import CALL_S, Failure, failure
from tests.host.support import World
from tests.support import wait_until_async

TASKS = {
    "e": "feature-extraction",
    "c": "text-classification",
    "g": "text-generation",
    "d": "depth-estimation",
    "e2": "feature-extraction",
}


@dataclass
class Scene:
    """A host with a model of each task, and a client of its inference by task."""

    oip: OipScene
    stub: InferenceServiceStub

    def answer(self, make: Callable[[oip.ModelInferRequest], oip.ModelInferResponse]) -> None:
        """Have the workers answer by ``make``."""

        def handler(spec: LoadSpec, payload: bytes) -> bytes:
            asked = oip.ModelInferRequest.FromString(payload)
            made = make(asked)
            made.model_name, made.model_version = asked.model_name, str(spec.version)
            return made.SerializeToString()

        self.oip.run.workers.handler = handler

    async def fail(self, call: Any) -> Failure:
        """Return the error that a call ends with."""
        return await failure(call)


@pytest_asyncio.fixture
async def at(tmp_path: Path) -> AsyncIterator[Scene]:
    async with oip_scene(World(tmp_path)) as scene:
        run = scene.run
        run.workers.pieces["g"] = pieces
        for model, task in TASKS.items():
            uri = f"hf://org/{model}"
            files = {"config.json": b"{}", "model.safetensors": b"w" * 98}
            run.world.downloads.add(uri, files, task=task, predicted_bytes=100)
            await run.host.models.create(ModelSpec(source=Source(uri=uri)), model)
            await run.end(await run.host.transfers.download(model))
        addresses = ["unix:/run/x.sock", "127.0.0.1:9999"]
        services = [task_service(run.host, scene.service, 2**20, lambda: addresses)]
        async with serving(services) as server:
            yield Scene(scene, InferenceServiceStub(server.channel()))


def tensors(**named: tuple[str, list[int], bytes]) -> oip.ModelInferResponse:
    """Return an answer of raw tensors."""
    made = oip.ModelInferResponse()
    for name, (datatype, shape, raw) in named.items():
        made.outputs.add(name=name, datatype=datatype, shape=shape)
        made.raw_output_contents.append(raw)
    return made


def piece(text: str, reason: str, count: int) -> bytes:
    """Return one encoded response of a generation, as the worker sends them."""
    return tensors(
        text_output=("BYTES", [1], pack_texts([text])),
        finish_reason=("BYTES", [1], pack_texts([reason])),
        num_input_tokens=("UINT32", [1], struct.pack("<I", 7)),
        num_output_tokens=("UINT32", [1], struct.pack("<I", count)),
    ).SerializeToString()


def pieces(spec: LoadSpec, payload: bytes) -> list[bytes]:
    """Answer a generation with the names of its inputs, then with what they hold."""
    asked = oip.ModelInferRequest.FromString(payload)
    names = [one.name for one in asked.inputs]
    shown = " ".join(unpack_texts(raw, 1)[0] for raw in asked.raw_input_contents[:-1])
    return [piece(" ".join(names), "", 1), piece(shown, "length", 2)]


def rows(asked: oip.ModelInferRequest) -> oip.ModelInferResponse:
    """Answer each text with its length and a half."""
    (shape,) = asked.inputs[0].shape
    texts = unpack_texts(asked.raw_input_contents[0], shape)
    raw = b"".join(struct.pack("<2f", len(text), 0.5) for text in texts)
    return tensors(embedding=("FP32", [shape, 2], raw))


# --- embed ----------------------------------------------------------------------------------------


async def test_embed_gives_a_vector_for_each_text(at: Scene) -> None:
    """A model on disk is loaded for it; texts go as they are, vectors come in the order of the texts."""
    at.answer(rows)
    answer = await at.stub.Embed(
        pb.EmbedRequest(model="models/e", texts=["a", "", "dé!"]), timeout=CALL_S
    )
    assert [list(one.values) for one in answer.embeddings] == [[1, 0.5], [0, 0.5], [3, 0.5]]
    assert (answer.model, answer.version) == ("models/e", 1)


async def test_a_slot_stands_for_its_model(at: Scene) -> None:
    """A slot's name is valid where a model's is."""
    at.answer(rows)
    done = await at.oip.run.host.slots.switch("role", "e")
    await at.oip.run.end(done)
    answer = await at.stub.Embed(pb.EmbedRequest(model="models/role", texts=["ab"]), timeout=CALL_S)
    assert list(answer.embeddings[0].values) == [2, 0.5]


async def test_a_fallback_model_is_named(at: Scene) -> None:
    """Where another model answers, the answer says which."""
    at.answer(rows)

    def with_fallback(spec: ModelSpec) -> ModelSpec:
        return replace(spec, config=replace(spec.config, fallback_model="e2"))

    await at.oip.run.host.models.update("e", with_fallback)
    at.oip.run.workers.load_errors["e"] = ModelhostError(Reason.LOAD_FAILED, "no")
    answer = await at.stub.Embed(pb.EmbedRequest(model="models/e", texts=["a"]), timeout=CALL_S)
    assert answer.model == "models/e2"


@pytest.mark.parametrize(
    "answer",
    [
        tensors(),
        tensors(embedding=("FP16", [1, 2], b"1234")),
        tensors(embedding=("FP32", [1, 2], b"1234")),
        tensors(embedding=("FP32", [2, 1], b"12345678")),
        tensors(embedding=("FP32", [1, 0], b"")),
    ],
    ids=["nothing", "datatype", "length", "rows", "empty"],
)
async def test_an_answer_that_is_no_embedding_is_told(
    at: Scene, answer: oip.ModelInferResponse
) -> None:
    """A backend that answers otherwise than its task does is INFERENCE_FAILED, with what to do."""
    at.answer(lambda asked: answer)
    found = await at.fail(at.stub.Embed(pb.EmbedRequest(model="models/e", texts=["a"])))
    assert (found.reason, found.metadata["model"]) == ("INFERENCE_FAILED", "e")
    assert "ModelMetadata" in found.message


# --- classify -------------------------------------------------------------------------------------


async def test_classify_gives_the_likeliest_labels(at: Scene) -> None:
    """As many labels of each text as were asked for, 5 by default, the likeliest first; names may have colons."""
    asked_for = []

    def answer(asked: oip.ModelInferRequest) -> oip.ModelInferResponse:
        asked_for.append(asked.outputs[0].parameters["classification"].int64_param)
        raw = pack_texts(["0.750000:1:a:b", "0.250000:0:c", "0.600000:0:c", "0.400000:1"])
        return tensors(scores=("BYTES", [2, 2], raw))

    at.answer(answer)
    request = pb.ClassifyRequest(model="models/c", texts=["x", "y"], top_k=2)
    found = await at.stub.Classify(request, timeout=CALL_S)
    labels = [[(one.name, one.score, one.index) for one in c.labels] for c in found.classifications]
    assert labels == [
        [("a:b", 0.75, 1), ("c", 0.25, 0)],
        [("c", pytest.approx(0.6), 0), ("1", pytest.approx(0.4), 1)],
    ]
    request.top_k = 0
    await at.stub.Classify(request, timeout=CALL_S)
    assert asked_for == [2, 5]


@pytest.mark.parametrize("raw", [b"\1", pack_texts(["one"]), pack_texts(["0.5:x:y"])])
async def test_an_answer_that_is_no_label_is_told(at: Scene, raw: bytes) -> None:
    """Cut elements and others than `score:index:label` are INFERENCE_FAILED."""
    at.answer(lambda asked: tensors(scores=("BYTES", [1, 1], raw)))
    found = await at.fail(at.stub.Classify(pb.ClassifyRequest(model="models/c", texts=["a"])))
    assert found.reason == "INFERENCE_FAILED"


@pytest.mark.parametrize("top_k", [-1, 1001])
async def test_how_many_labels_is_bounded(at: Scene, top_k: int) -> None:
    """INVALID_ARGUMENT names the field and its range."""
    request = pb.ClassifyRequest(model="models/c", texts=["a"], top_k=top_k)
    found = await at.fail(at.stub.Classify(request))
    assert found.metadata == {"field": "top_k", "expected": "0 to 1000", "actual": str(top_k)}


# --- generate -------------------------------------------------------------------------------------


async def generated(at: Scene, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    """Return the pieces of a text."""
    return [one async for one in at.stub.Generate(request, timeout=CALL_S)]


async def test_generate_sends_pieces_as_they_come(at: Scene) -> None:
    """A prompt goes as it is, parameters that are set as JSON; pieces have counts, the last one says why."""
    sampling = pb.SamplingParameters(max_tokens=3, temperature=0.0, stop=["."])
    request = pb.GenerateRequest(model="models/g", prompt="say é", sampling=sampling)
    first, last = await generated(at, request)
    assert first.text == "text_input sampling_parameters stream"
    assert first.finish_reason == pb.GenerateResponse.FINISH_REASON_UNSPECIFIED
    assert last.text.startswith("say é {")
    sent = json.loads(last.text.removeprefix("say é "))
    assert sent == {"max_tokens": 3, "temperature": 0.0, "stop": ["."]}
    assert last.finish_reason == pb.GenerateResponse.LENGTH
    assert (last.input_token_count, last.output_token_count) == (7, 2)
    assert last.model == "models/g"


async def test_a_text_comes_whole_where_it_is_asked_for_so(at: Scene) -> None:
    """Who does not read along says so, and the worker makes one piece of it."""
    sent: list[bool] = []

    def note(spec: LoadSpec, payload: bytes) -> list[bytes]:
        asked = oip.ModelInferRequest.FromString(payload)
        names = [one.name for one in asked.inputs]
        sent.append(bool(asked.raw_input_contents[names.index("stream")][0]))
        return [piece("all", "stop", 2)]

    at.oip.run.workers.pieces["g"] = note
    for whole in (True, False):
        request = pb.GenerateRequest(model="models/g", prompt="x", whole_text=whole)
        assert [one.text for one in await generated(at, request)] == ["all"]
    assert sent == [False, True]


async def test_a_conversation_goes_as_messages(at: Scene) -> None:
    """Roles and contents in order, for the model's chat template."""
    said = [pb.ChatMessage(role="system", content="be"), pb.ChatMessage(role="user", content="é")]
    first, last = await generated(at, pb.GenerateRequest(model="models/g", messages=said))
    assert first.text == "messages stream"
    assert json.loads(last.text) == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "é"},
    ]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": [pb.ChatMessage(role="user")]}, "prompt"),
        ({"messages": [pb.ChatMessage(role="user")] * 1025}, "messages"),
    ],
    ids=["neither", "both", "many"],
)
async def test_what_generate_refuses(at: Scene, fields: dict[str, Any], named: str) -> None:
    """Neither or both of prompt and messages, and too many of these, are INVALID_ARGUMENT."""
    found = await at.fail(generated(at, pb.GenerateRequest(model="models/g", **fields)))
    assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", named)


async def test_a_cancelled_generation_leaves_nothing(at: Scene) -> None:
    """When its client goes, the request leaves the worker and the budgets."""
    gate = at.oip.run.workers.piece_gate("g")
    gate.close()
    call = at.stub.Generate(pb.GenerateRequest(model="models/g", prompt="x"))
    assert (await call.read()).text
    assert at.oip.service.budget.used > 0
    call.cancel()
    await wait_until_async(lambda: at.oip.service.budget.used == 0)
    await wait_until_async(lambda: at.oip.run.host.inference.in_flight == 0)


# --- what each of them says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [pb.EmbedRequest(texts=["x"]), pb.ClassifyRequest(texts=["x"]), pb.GenerateRequest(prompt="x")],
)
async def test_version_and_priority_are_a_requests_own(at: Scene, request_: Any) -> None:
    """Another version than that in service is not found; the priority goes to the worker as ModelInfer's does."""
    method = type(request_).__name__.removesuffix("Request")
    model = method[0].lower()
    found = []
    service = at.oip.service
    for name in ("infer", "stream"):
        real = getattr(service, name)

        def noting(head: Any, *rest: Any, real: Any = real) -> Any:
            found.append(head.priority)
            return real(head, *rest)

        setattr(service, name, noting)

    async def ask(**fields: int) -> Failure | None:
        asked = type(request_)(model=f"models/{model}", **fields)
        asked.MergeFrom(request_)
        call = getattr(at.stub, method)(asked, timeout=CALL_S)
        return await at.fail(call.read() if method == "Generate" else call)

    failed = await ask(version=7, priority=3)
    assert failed.reason == "MODEL_NOT_FOUND"
    assert "7" in failed.message
    assert found == [3]


# --- other tasks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "model", "instead"),
    [
        ("Embed", "c", "call Classify"),
        ("Embed", "g", "call Generate"),
        ("Classify", "e", "call Embed"),
        ("Generate", "e", "call Embed"),
        ("Generate", "d", "modelhost show d"),
    ],
)
async def test_a_model_of_another_task_is_told(
    at: Scene, method: str, model: str, instead: str
) -> None:
    """INVALID_ARGUMENT names the model's task and what to call instead; nothing is loaded for it."""
    request = {
        "Embed": pb.EmbedRequest(texts=["x"]),
        "Classify": pb.ClassifyRequest(texts=["x"]),
        "Generate": pb.GenerateRequest(prompt="x"),
    }[method]
    request.model = f"models/{model}"
    call = getattr(at.stub, method)(request)
    found = await at.fail(call.read() if method == "Generate" else call)
    assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", "model")
    assert found.metadata["actual"] == TASKS[model]
    assert instead in found.message
    assert not at.oip.run.host.registry.committed.instances


# --- what a model takes --------------------------------------------------------------------------


async def test_a_model_says_what_to_send_and_what_comes_back(at: Scene) -> None:
    """It is loaded for it; tensors have their descriptions, and its method and address are in the examples."""
    workers = at.oip.run.workers
    workers.inputs["e"] = (TensorSpec("text", "BYTES", (-1,), "UTF-8 texts"),)
    workers.outputs["e"] = (TensorSpec("embedding", "FP32", (-1, 2), "of length 1"),)
    found = await at.stub.DescribeModel(pb.DescribeModelRequest(model="models/e"), timeout=CALL_S)
    assert (found.model, found.version, found.task) == ("models/e", 1, "feature-extraction")
    assert (found.method, found.streams) == ("Embed", False)
    (text,) = found.inputs
    assert (text.name, text.datatype, list(text.shape)) == ("text", "BYTES", [-1])
    assert (text.description, found.outputs[0].description) == ("UTF-8 texts", "of length 1")
    made = {one.tool: one.text for one in found.examples}
    assert made.keys() == {"python", "tritonclient", "buf curl"}
    assert 'host.embed("e"' in made["python"]
    assert "127.0.0.1:9999" in made["tritonclient"]


async def test_a_model_of_any_tensors_has_examples_of_some(at: Scene) -> None:
    """What nobody has words for is shown by ModelInfer."""
    found = await at.stub.DescribeModel(pb.DescribeModelRequest(model="models/d"), timeout=CALL_S)
    assert (found.method, list(found.inputs)) == ("", [])
    assert all("infer" in one.text.lower() for one in found.examples)


# --- texts as tensors -----------------------------------------------------------------------------


@given(st.lists(st.text()))
def test_texts_come_back_from_their_raw_form(texts: list[str]) -> None:
    """What was packed is unpacked."""
    assert unpack_texts(pack_texts(texts), len(texts)) == texts


@given(st.binary(max_size=40), st.integers(0, 4))
def test_any_bytes_are_texts_or_refused(raw: bytes, count: int) -> None:
    """Never another number of texts than was asked for, never another error."""
    try:
        texts = unpack_texts(raw, count)
    except ValueError:
        return
    assert len(texts) == count
