"""The reference of the hot path: ModelInfer of an identity model as anybody would write it on grpc.aio.

One process, the whole message parsed and answered by the servicer itself: no worker, no routing, no checks.
``--tuned`` makes the process settings that the daemon makes (allocator, loop, gRPC's experiments). Beside
it ``/bench.Echo/Echo`` answers the bytes that came.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import loop_lag

SERVICE = "inference.GRPCInferenceService"


def main() -> None:
    """Serve on the given address until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--lag", type=Path, help="where to note how late the loop is")
    arguments = parser.parse_args()
    factory = None
    if arguments.tuned:
        from modelhostd import process

        process.prepare()
        factory, _ = process.loop_factory(wanted=True)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(arguments.address, arguments.lag))


async def serve(address: str, lag: Path | None) -> None:
    """Serve, and say so in one line on standard output."""
    import grpc

    from modelhost.oip import open_inference_pb2 as oip

    async def infer(request: oip.ModelInferRequest, _: object) -> oip.ModelInferResponse:
        """Answer the inputs as outputs."""
        answer = oip.ModelInferResponse(
            model_name=request.model_name, model_version="1", id=request.id
        )
        for tensor in request.inputs:
            answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        answer.raw_output_contents.extend(request.raw_input_contents)
        return answer

    async def echo(request: bytes, _: object) -> bytes:
        """Answer the bytes that came."""
        return request

    # What the generated add_..._to_server does, for one method of the twenty.
    handler = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=oip.ModelInferRequest.FromString,
        response_serializer=oip.ModelInferResponse.SerializeToString,
    )
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        )
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),)
    )
    echoes: Any = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", echoes),))
    server.add_insecure_port(address)
    await server.start()
    if lag is not None:
        loop_lag.watch(lag)
    sys.stdout.write("serving\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    main()
