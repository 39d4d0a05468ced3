"""Single calls of the Open Inference Protocol with the library of gRPC: what is not timed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from modelhost.oip import open_inference_pb2 as oip

SERVICE = "/inference.GRPCInferenceService"
CALL_S = 60.0
ANY_SIZE = (("grpc.max_receive_message_length", -1),)


def infer(target: str, request: bytes) -> oip.ModelInferResponse:
    """Return the answer to an encoded request."""
    with grpc.insecure_channel(target, options=ANY_SIZE) as channel:
        call: Any = channel.unary_unary(
            f"{SERVICE}/ModelInfer", response_deserializer=oip.ModelInferResponse.FromString
        )
        answer: oip.ModelInferResponse = call(request, timeout=CALL_S)
        return answer


@contextmanager
def model_times(target: str, model: str) -> Iterator[Any]:
    """Yield a function that returns the nanoseconds that a model has computed since it was loaded."""
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(
            f"{SERVICE}/ModelStatistics",
            request_serializer=oip.ModelStatisticsRequest.SerializeToString,
            response_deserializer=oip.ModelStatisticsResponse.FromString,
        )

        def total_ns() -> int:
            found = call(oip.ModelStatisticsRequest(name=model), timeout=CALL_S)
            return int(found.model_stats[0].inference_stats.compute_infer.ns)

        yield total_ns
