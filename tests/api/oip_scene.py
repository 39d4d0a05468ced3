"""A host whose models are inferred with over a real socket, and requests for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from modelhost.oip import open_inference_pb2 as oip
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelhostd.adapters.clock import SystemClock
from modelhostd.api.inference import InferenceOptions, InferenceService, inference_service
from modelhostd.ports import LoadSpec, TensorSpec, Workers
from tests.api.serving import Serving, serving
from tests.host.support import BUDGET, Running, World
from tests.support import DEADLINE_S

REAL_BUDGET = 2**30
"""Real models measure what they take."""

PATH = "/inference.GRPCInferenceService/ModelInfer"


def request(model: str = "a", **fields: object) -> oip.ModelInferRequest:
    """Return a request with one tensor of four bytes."""
    made = oip.ModelInferRequest(model_name=model, **fields)  # type: ignore[arg-type]
    made.inputs.add(name="INPUT0", datatype="UINT8", shape=[1, 4])
    made.raw_input_contents.append(b"\1\2\3\4")
    return made


def identity(spec: LoadSpec, payload: bytes) -> bytes:
    """Answer as the identity backend does: the inputs as outputs."""
    asked = oip.ModelInferRequest.FromString(payload)
    answer = oip.ModelInferResponse(
        model_name=asked.model_name, model_version=str(spec.version), id=asked.id
    )
    for tensor in asked.inputs:
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    answer.raw_output_contents.extend(asked.raw_input_contents)
    return answer.SerializeToString()


@dataclass
class OipScene:
    """A started host, its inference service, and a client of it."""

    run: Running
    service: InferenceService
    serving: Serving
    stub: GRPCInferenceServiceStub
    channel: grpc.aio.Channel

    async def infer(self, asked: oip.ModelInferRequest, **call: float) -> oip.ModelInferResponse:
        """Send one request."""
        answer: oip.ModelInferResponse = await self.stub.ModelInfer(asked, **call)
        return answer

    async def infer_bytes(self, payload: bytes) -> bytes:
        """Send bytes in the place of a request."""
        answer: bytes = await self.channel.unary_unary(PATH)(payload)
        return answer


class Stream:
    """One open stream."""

    def __init__(self, at: OipScene, *metadata: tuple[str, str]) -> None:
        self.call = at.stub.ModelStreamInfer(metadata=metadata)

    async def send(self, *requests: oip.ModelInferRequest) -> None:
        """Send requests."""
        for one in requests:
            await self.call.write(one)

    async def next(self) -> oip.ModelStreamInferResponse:
        """Return the next answer."""
        async with asyncio.timeout(DEADLINE_S):
            answer = await self.call.read()
        assert answer is not grpc.aio.EOF, "the stream ended"
        return answer

    async def ended(self) -> bool:
        """Whether the stream ended well, with nothing left to read."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.call.read() is grpc.aio.EOF

    async def fail(self) -> grpc.aio.AioRpcError:
        """Read to the end, which must be an error."""
        try:
            while True:
                await self.next()
        except grpc.aio.AioRpcError as error:
            return error


@asynccontextmanager
async def oip_scene(
    world: World,
    *,
    options: InferenceOptions | None = None,
    real_workers: Workers | None = None,
    host_budget: int = 0,
) -> AsyncIterator[OipScene]:
    """Start a host on ``world`` (with a real clock where it has real workers) and serve inference."""
    clock = SystemClock() if real_workers is not None else None
    budget = BUDGET if real_workers is None else REAL_BUDGET
    async with world.host(
        budget=budget, host_budget=host_budget, real_workers=real_workers, real_clock=clock
    ) as run:
        run.workers.handler = identity
        run.workers.inputs["a"] = (TensorSpec("INPUT0", "UINT8", (-1, 4)),)
        run.workers.outputs["a"] = (TensorSpec("INPUT0", "UINT8", (-1, 4)),)
        service = inference_service(run.host, options or InferenceOptions())
        async with serving([service]) as server:
            channel = server.channel()
            assert isinstance(service.servicer, InferenceService)
            stub = GRPCInferenceServiceStub(channel)
            yield OipScene(run, service.servicer, server, stub, channel)
