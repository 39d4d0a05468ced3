"""Large requests: nothing of them waits for the collector, and others have a turn between two copies of them."""

import asyncio
import gc
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from modelhostd.api.calls import Call
from modelhostd.api.inference import PAUSE_BYTES, InferenceOptions, InferenceService
from modelhostd.api.methods import Service
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.oip_scan import RequestHead
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


@pytest.mark.parametrize(
    ("size", "order"), [(PAUSE_BYTES, "waiting, sent"), (1000, "sent, waiting")]
)
async def test_others_have_a_turn_before_a_large_request_is_copied(size: int, order: str) -> None:
    """What waits for the loop comes between gRPC's copies of a large request and ours; a small one goes on at once."""
    done: list[str] = []

    async def infer(*_: Any) -> Any:
        done.append("sent")
        return SimpleNamespace(payload=b"answer")

    host: Any = SimpleNamespace(inference=SimpleNamespace(infer=infer))
    call: Any = SimpleNamespace(remaining_s=lambda: None)
    service = InferenceService(host, InferenceOptions())
    head = RequestHead("m", "", "")
    asyncio.get_running_loop().call_soon(done.append, "waiting")
    assert await service.infer(head, bytes(size), call) == b"answer"
    await asyncio.sleep(0)
    assert (", ".join(done), service.budget.used) == (order, 0)
