"""What a call held is freed when it ends: requests are large, and nothing of them waits for the collector."""

import gc
import tracemalloc
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from modelhostd.api.calls import Call
from modelhostd.api.methods import Service
from modelhostd.core.errors import ModelhostError, Reason
from tests.api.serving import serving
from tests.api.support import CALL_S
from tests.api.test_api_wrapper import DESCRIPTOR, GET, Servicer
from tests.support import wait_until_async

SIZE = 4 * 2**20


@pytest.fixture
def _counted_without_collector() -> Iterator[None]:
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


@pytest.mark.usefixtures("_counted_without_collector")
async def test_a_refused_request_is_freed() -> None:
    """Errors, their frames and gRPC's note of the abort hold each other, but not the request with them."""

    async def refuse(request: bytes, call: Call) -> Any:
        try:
            raise KeyError(request[:1])
        except KeyError:
            raise ModelhostError(
                Reason.QUEUE_FULL, f"{len(request)} bytes are too many", {}
            ) from None

    limits = {"GetOperation": 2 * SIZE}
    service = Service(DESCRIPTOR, Servicer(refuse), raw=frozenset(limits), limits=limits)
    data = bytes(SIZE)
    async with serving([service]) as scene:
        method = scene.channel().unary_unary(GET)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(4):
            with pytest.raises(grpc.aio.AioRpcError, match="bytes are too many"):
                await method(data, timeout=CALL_S)
        await wait_until_async(lambda: tracemalloc.get_traced_memory()[0] < before + SIZE // 2)
