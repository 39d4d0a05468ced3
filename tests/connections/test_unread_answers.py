"""Large answers that their clients do not read: bounded in all, and no others are refused but large ones."""

from typing import Any

import grpc
import pytest

from modelhost import Client
from modelhost.oip import open_inference_pb2 as oip
from tests.api.serving import info_of
from tests.ending.scene import CALL_S, INFER, MODEL, OWN, scene
from tests.support import wait_until

MIB = 2**20
LIMIT = 16 * MIB
ANSWER = 2 * MIB


@pytest.fixture
def at():
    """A daemon with a loaded model that answers what it is sent."""
    flags = [f"limits.inference_{what}={LIMIT}" for what in ("bytes_in_flight", "message_bytes")]
    with scene(*(part for flag in flags for part in ("--set", flag))) as made:
        yield made.loaded()


def _request(size: int) -> bytes:
    request = oip.ModelInferRequest(model_name=MODEL, raw_input_contents=[bytes(size)])
    request.inputs.add(name="x", datatype="UINT8", shape=[size])
    return request.SerializeToString()


def test_unread_answers_are_bounded(at) -> None:
    """A client that asks and never reads gets so much and then QUEUE_FULL; small answers go on meanwhile."""
    # Without the probe the window stays small: else the client's library reads ahead.
    options = [*OWN, ("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(at.daemon.target, options=options) as channel:
        # As a stream: its answer is read when it is asked for, and not before.
        begin = channel.stream_stream(INFER)
        unread: list[Any] = []
        with Client(at.daemon.target) as client:
            for number in range(LIMIT // ANSWER - 1):
                unread.append(begin(iter([_request(ANSWER)])))
                wait_until(lambda n=number: client.statistics().request_count > n)
            refused = begin(iter([_request(ANSWER)]))
            with pytest.raises(grpc.RpcError) as full:
                list(refused)
            assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert info_of(full.value).reason == "QUEUE_FULL"
            small = channel.unary_unary(INFER)
            assert len(small(_request(1000), timeout=CALL_S)) > 1000
            # Reading one makes room for another.
            assert len(next(unread.pop())) > ANSWER
            infer = channel.unary_unary(INFER)
            wait_until(lambda: _answered(infer), what="there is room again")
            for call in unread:
                call.cancel()
    workers = at.workers()
    assert at.daemon.stop() == 0
    at.check_ended(workers)


def _answered(infer: Any) -> bool:
    try:
        return len(infer(_request(ANSWER), timeout=CALL_S)) > ANSWER
    except grpc.RpcError as error:
        return info_of(error).reason != "QUEUE_FULL"
