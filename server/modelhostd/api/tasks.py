"""InferenceService: Embed, Classify and Generate, on the way that ModelInfer and ModelStreamInfer take."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from modelhost.v1 import inference_service_pb2
from modelhostd.api import examples, task_tensors
from modelhostd.api.admission import Group
from modelhostd.api.calls import Call
from modelhostd.api.inference import InferenceService
from modelhostd.api.methods import Service
from modelhostd.core import names
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.oip_scan import RequestHead
from modelhostd.host import Host
from modelhostd.ports import TensorSpec

_pb = inference_service_pb2

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
"""Of a request: two million empty texts, which are refused after 30 ms of parsing."""

DEFAULT_ADDRESS = "127.0.0.1:7411"
"""What stands in examples where the daemon listens on no port."""

METHOD_OF = {
    "feature-extraction": "Embed",
    "text-classification": "Classify",
    "text-generation": "Generate",
}
"""What is called for a model, by its task."""


def task_service(
    host: Host,
    inference: InferenceService,
    message_bytes_max: int,
    addresses: Callable[[], Sequence[str]] = tuple,
) -> Service:
    """Return the service to offer; ``inference`` is what does its work, ``addresses`` stand in examples."""
    calls = ("Embed", "Classify")
    limit = min(MESSAGE_BYTES_MAX, message_bytes_max)
    return Service(
        _pb.DESCRIPTOR.services_by_name["InferenceService"],
        TaskService(host, inference, addresses),
        groups={**dict.fromkeys(calls, Group.INFERENCE), "DescribeModel": Group.STREAM},
        limits=dict.fromkeys((*calls, "Generate"), limit),
        # As of ModelInfer: the caller's deadline bounds it.
        timeouts=dict.fromkeys((*calls, "DescribeModel")),
    )


class TaskService:
    """See InferenceService in the contract."""

    def __init__(
        self, host: Host, inference: InferenceService, addresses: Callable[[], Sequence[str]]
    ) -> None:
        self._host = host
        self._inference = inference
        self._addresses = addresses

    async def embed(self, request: _pb.EmbedRequest, call: Call) -> bytes:
        """Return the encoded EmbedResponse."""
        name = self._model(request.model, "feature-extraction")
        asked = task_tensors.embed_request(name, request.texts)
        answer = await self._ask(_head(name, request), asked, call)
        encoded = task_tensors.embed_response(answer, len(request.texts))
        self._inference.count_unread(name, len(encoded), call)
        return encoded

    async def classify(self, request: _pb.ClassifyRequest, call: Call) -> _pb.ClassifyResponse:
        """Return the highest scores of each text."""
        name = self._model(request.model, "text-classification")
        asked = task_tensors.classify_request(name, request.texts, request.top_k)
        answer = await self._ask(_head(name, request), asked, call)
        return task_tensors.classify_response(answer, len(request.texts))

    async def generate(
        self, request: _pb.GenerateRequest, call: Call
    ) -> AsyncGenerator[_pb.GenerateResponse, None]:
        """Yield the pieces of a text; the next one is asked for when the client has taken this one."""
        name = self._model(request.model, "text-generation")
        asked = task_tensors.generate_request(name, request)
        replies = self._inference.stream(_head(name, request), asked, call)
        try:
            async with aclosing(replies):
                async for _, reply in replies:
                    yield task_tensors.generate_response(task_tensors.Answer(name, reply.payload))
        except ModelhostError as error:
            raise task_tensors.own_words(error) from None

    async def describe_model(
        self, request: _pb.DescribeModelRequest, call: Call
    ) -> _pb.ModelDescription:
        """Return what to send and what comes back, loading the model as a request would."""
        name = names.parse("models", "model", request.model)
        model = self._host.inference.model_for(name)
        route, loaded = await self._inference.loaded(name, "", call)
        inputs, outputs = loaded.inputs, loaded.outputs
        method = examples.method_for(METHOD_OF.get(model.task, ""), inputs, outputs)
        address = next((one for one in self._addresses() if ":/" not in one), DEFAULT_ADDRESS)
        made = examples.examples(name, method, inputs, outputs, address)
        return _pb.ModelDescription(
            model=f"models/{model.id}",
            version=route.version,
            task=model.task,
            method=method,
            inputs=[_tensor(one) for one in inputs],
            outputs=[_tensor(one) for one in outputs],
            max_batch_size=loaded.max_batch_size,
            streams=loaded.decoupled,
            examples=[_pb.ModelDescription.Example(tool=t, text=text) for t, text in made.items()],
        )

    async def _ask(self, head: RequestHead, asked: bytes, call: Call) -> task_tensors.Answer:
        try:
            answer = await self._inference.infer(head, asked, call)
        except ModelhostError as error:
            raise task_tensors.own_words(error) from None
        return task_tensors.Answer(head.model_name, answer)

    def _model(self, name: str, task: str) -> str:
        """Return the id in ``models/{model}``, a model's or a slot's.

        Raises INVALID_ARGUMENT for a malformed name and for a model of another task, MODEL_NOT_FOUND.
        """
        key = names.parse("models", "model", name)
        found = self._host.inference.model_for(key).task
        if found and found != task:
            other = METHOD_OF.get(found)
            instead = (
                f"call {other}"
                if other
                else f"call ModelInfer; `modelhost show {key}` says what it takes"
            )
            raise ModelhostError(
                Reason.INVALID_ARGUMENT,
                f"{METHOD_OF[task]} takes models of the task {task}; '{key}' is of the task {found}: "
                f"{instead}",
                {"field": "model", "expected": task, "actual": found},
            )
        return key


def _head(
    name: str, request: _pb.EmbedRequest | _pb.ClassifyRequest | _pb.GenerateRequest
) -> RequestHead:
    """Return what a request says of itself."""
    version = str(request.version) if request.version else ""
    return RequestHead(name, version, "", priority=request.priority)


def _tensor(spec: TensorSpec) -> _pb.ModelDescription.Tensor:
    return _pb.ModelDescription.Tensor(
        name=spec.name, datatype=spec.datatype, shape=spec.shape, description=spec.description
    )
