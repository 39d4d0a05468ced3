"""More calls at once than one connection may have: those beyond wait in their client, none is refused."""

import asyncio
from pathlib import Path

import grpc

from modelhost.oip import open_inference_pb2 as oip
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.api.support import served

BURST = 300
"""Of 128 that a connection may have."""


async def test_a_burst_on_a_new_connection_is_answered(tmp_path: Path) -> None:
    """As calls end others take their place, before gRPC has freed those that ended."""
    async with served(tmp_path) as it:
        for _ in range(4):
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(it.server.addresses[0], options) as channel:
                stub = GRPCInferenceServiceStub(channel)
                calls = [stub.ServerLive(oip.ServerLiveRequest()) for _ in range(BURST)]
                assert all(answer.live for answer in await asyncio.gather(*calls))
