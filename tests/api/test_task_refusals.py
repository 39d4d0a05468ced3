"""Embed, Classify and Generate: what a model refuses is told in the names of the request's own fields."""

from typing import Any

import pytest

from modelhost.v1 import inference_service_pb2 as pb
from modelhost.v1.inference_service_pb2_grpc import InferenceServiceStub
from modelhostd.api.tasks import task_service
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import Source
from modelhostd.ports import LoadSpec
from tests.api.oip_scene import oip_scene
from tests.api.serving import serving
from tests.api.support import CALL_S, Failure, failure
from tests.host.support import World

TEMPLATE = "text_input: the model has no chat template"
TASKS = {
    "Embed": "feature-extraction",
    "Classify": "text-classification",
    "Generate": "text-generation",
}


async def refused(folder: Any, request: Any, field: str, expected: str) -> Failure:
    """Return what a request ends with where its model refuses one field, as workers tell it."""
    method = type(request).__name__.removesuffix("Request")
    request.model = "models/m"
    source = Source(uri="hf://org/m")

    def refuse(spec: LoadSpec, payload: bytes) -> Any:
        metadata = {"field": field, "expected": expected, "actual": "9"}
        told = f"{field} for model 'm': expected {expected}, got 9"
        raise ModelhostError(Reason.INVALID_ARGUMENT, told, metadata)

    async with oip_scene(World(folder)) as scene:
        run = scene.run
        files = {"config.json": b"{}", "model.safetensors": b"w" * 98}
        run.world.downloads.add(source.uri, files, task=TASKS[method], predicted_bytes=100)
        await run.host.models.create(ModelSpec(source=source), "m")
        await run.end(await run.host.transfers.download("m"))
        run.workers.handler = refuse
        async with serving([task_service(run.host, scene.service, 2**20)]) as server:
            call = getattr(InferenceServiceStub(server.channel()), method)(request, timeout=CALL_S)
            return await failure(call.read() if method == "Generate" else call)


@pytest.mark.parametrize(
    ("request_", "field", "named"),
    [
        (pb.EmbedRequest(texts=["x"]), "text[0]", "texts[0]"),
        (pb.ClassifyRequest(texts=["x"]), "text[0]", "texts[0]"),
        (pb.GenerateRequest(prompt="x"), "text_input", "prompt"),
        (pb.GenerateRequest(prompt="x"), "text_input[0]", "prompt"),
        (pb.GenerateRequest(prompt="x"), "parameters[max_tokens]", "sampling.max_tokens"),
        (pb.GenerateRequest(prompt="x"), "sampling_parameters", "sampling"),
        (pb.GenerateRequest(prompt="x"), "model_version", "model_version"),
    ],
    ids=["embed", "classify", "prompt", "one prompt", "sampling", "all sampling", "another"],
)
async def test_the_field_is_the_requests(
    tmp_path: Any, request_: Any, field: str, named: str
) -> None:
    """The field of the error, and what its message begins with."""
    found = await refused(tmp_path, request_, field, "less")
    assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", named)
    assert found.message == f"{named} for model 'm': expected less, got 9"


async def test_a_model_without_a_chat_template_wants_a_prompt(tmp_path: Any) -> None:
    """Not the tensor that stands for one, which the request does not have."""
    said = [pb.ChatMessage(role="user", content="x")]
    found = await refused(tmp_path, pb.GenerateRequest(messages=said), "messages", TEMPLATE)
    assert found.metadata["expected"] == "prompt: the model has no chat template"
    assert "expected prompt: the model has no chat template" in found.message
