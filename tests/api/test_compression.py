"""Requests that clients compress: taken, and unpacked no further than the limit of their method."""

import asyncio
import gzip
import threading
import tracemalloc
import zlib
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import host_service_pb2, residency_service_pb2
from modelhostd.api.compression import AT_ONCE_BYTES, FIRST, Unpacker, _thread
from modelhostd.core.errors import ModelhostError, Reason
from tests.api.support import CALL_S, Limits, Served, failure, served
from tests.fakes.clock import settle

MIB = 2**20
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
BOTH = (grpc.Compression.Gzip, grpc.Compression.Deflate)


def request(model: str, size: int) -> bytes:
    """Return an encoded request with one tensor of so many zeros."""
    made = oip.ModelInferRequest(model_name=model, raw_input_contents=[bytes(size)])
    made.inputs.add(name="x", datatype="UINT8", shape=[size])
    return made.SerializeToString()


def sizes_seen(it: Served) -> list[int]:
    """Return the sizes of the requests that reach the worker, as they come."""
    seen: list[int] = []

    def answer(_: object, payload: bytes) -> bytes:
        seen.append(len(payload))
        return oip.ModelInferResponse(id="done").SerializeToString()

    it.running.workers.handler = answer
    return seen


@pytest.mark.parametrize("compression", BOTH, ids=lambda c: c.name)
async def test_compressed_requests_are_answered(
    tmp_path: Path, compression: grpc.Compression
) -> None:
    """Small and large, alone and on a stream, for inference and for control; the worker sees them unpacked."""
    async with served(tmp_path) as it:
        await it.have()
        await it.load()
        seen = sizes_seen(it)
        asked = [request("minilm", size) for size in (10, 5_000, 3 * MIB)]
        infer = it.tcp.raw(INFER)
        for one in asked:
            answer = await infer(one, compression=compression, timeout=CALL_S)
            assert oip.ModelInferResponse.FromString(answer).id == "done"
        stream = it.tcp.channel.stream_stream(STREAM)
        answers = stream(iter(asked), compression=compression, timeout=CALL_S)
        assert len([answer async for answer in answers]) == len(asked)
        assert sorted(seen) == sorted([*map(len, asked)] * 2)
        named = residency_service_pb2.LoadModelRequest(name="models/minilm", device="")
        await it.tcp.residency.LoadModel(named, compression=compression, timeout=CALL_S)
        watch = host_service_pb2.GetHostRequest()
        await it.tcp.host.GetHost(watch, compression=compression, timeout=CALL_S)


@pytest.mark.parametrize("compression", BOTH, ids=lambda c: c.name)
async def test_torn_compression_is_a_bad_request_and_leaves_its_stream(
    tmp_path: Path, compression: grpc.Compression
) -> None:
    """What looks compressed and is not is refused as any other bytes are: in band where it came on a stream."""
    pack = gzip.compress if compression is grpc.Compression.Gzip else zlib.compress
    torn = pack(request("minilm", 5_000))[:-1]
    async with served(tmp_path) as it:
        await it.have()
        await it.load()
        sizes_seen(it)
        found = await failure(it.tcp.raw(INFER)(torn))
        assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", "request")
        stream = it.tcp.channel.stream_stream(STREAM)(
            iter([torn, request("minilm", 10)]), timeout=CALL_S
        )
        first, second = [oip.ModelStreamInferResponse.FromString(one) async for one in stream]
        assert "not a ModelInferRequest" in first.error_message
        assert second.infer_response.id == "done"


@pytest.mark.parametrize("compression", BOTH, ids=lambda c: c.name)
async def test_a_bomb_is_refused_at_its_methods_limit(
    tmp_path: Path, compression: grpc.Compression
) -> None:
    """What unpacks to more than the method takes is MESSAGE_TOO_LARGE, and the next call is served."""
    async with served(tmp_path, limits=Limits(inference_message_bytes=MIB)) as it:
        await it.have()
        await it.load()
        sizes_seen(it)
        bomb = request("minilm", 16 * MIB)
        found = await failure(it.tcp.raw(INFER)(bomb, compression=compression))
        assert (found.reason, found.metadata["limitBytes"]) == ("MESSAGE_TOO_LARGE", str(MIB))
        control = it.tcp.raw("/modelhost.v1.HostService/GetHost")
        found = await failure(control(bytes(4 * MIB), compression=compression))
        assert (found.reason, found.metadata["limitBytes"]) == ("MESSAGE_TOO_LARGE", "262144")
        good = await it.tcp.raw(INFER)(request("minilm", 900_000), compression=compression)
        assert good


async def test_the_bytes_in_flight_are_those_that_were_unpacked(tmp_path: Path) -> None:
    """The budget counts what a request holds here, not what it took on the wire."""
    limits = Limits(inference_message_bytes=2 * MIB, inference_bytes_in_flight=3 * MIB)
    async with served(tmp_path, limits=limits) as it:
        await it.have()
        await it.load()
        sizes_seen(it)
        gate = it.running.workers.infer_gate("minilm")
        gate.close()
        infer, asked = it.tcp.raw(INFER), request("minilm", 2 * MIB - 100)
        first = infer(asked, compression=grpc.Compression.Gzip)
        await gate.reached(1)
        found = await failure(infer(asked, compression=grpc.Compression.Gzip))
        assert found.reason == "QUEUE_FULL"
        assert "RetryInfo" in found.details
        gate.open()
        assert await first


async def test_many_bombs_at_one_time_take_the_room_of_one() -> None:
    """Whatever comes together is unpacked one after the other, and dropped at the limit."""
    limit, packed = 4 * MIB, gzip.compress(bytes(16 * MIB), 1)
    unpacked = Unpacker().unpacked

    async def refused() -> None:
        with pytest.raises(ModelhostError) as caught:
            await unpacked(packed, limit)
        assert caught.value.reason is Reason.MESSAGE_TOO_LARGE

    await refused()  # the thread starts
    tracemalloc.start()
    try:
        await asyncio.gather(*(refused() for _ in range(50)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What is unpacked at once of all of them, and of one the rest, put together and let go of.
    assert peak < 50 * 2 * AT_ONCE_BYTES + 5 * limit


async def test_messages_that_wait_to_be_unpacked_have_a_limit() -> None:
    """Compressed bytes that nobody has counted yet are bounded; who is above that tries again, and one alone is always taken."""
    packed = zlib.compress(bytes(MIB), 0)
    unpacked = Unpacker(waiting_bytes_max=4 * MIB).unpacked
    found = await asyncio.gather(
        *(unpacked(packed, 2 * MIB) for _ in range(10)), return_exceptions=True
    )
    taken = [one for one in found if one == bytes(MIB)]
    refused = [one for one in found if isinstance(one, ModelhostError)]
    assert (len(taken), len(refused)) == (3, 7)
    assert {error.reason for error in refused} == {Reason.QUEUE_FULL}
    assert await Unpacker(waiting_bytes_max=1).unpacked(packed, 2 * MIB) == bytes(MIB)
    assert await unpacked(packed, 2 * MIB) == bytes(MIB)


async def test_who_gives_up_is_counted_until_the_thread_has_let_go() -> None:
    """A cancelled call's message is still there until its turn is over: it goes on to count."""
    packed, unpacker = zlib.compress(bytes(MIB), 0), Unpacker(waiting_bytes_max=MIB)
    busy = threading.Event()
    _thread.submit(busy.wait, CALL_S)
    try:
        given_up = asyncio.ensure_future(unpacker.unpacked(packed, 2 * MIB))
        await settle()
        given_up.cancel()
        await settle()
        with pytest.raises(ModelhostError) as caught:
            await unpacker.unpacked(packed, 2 * MIB)
        assert caught.value.reason is Reason.QUEUE_FULL
    finally:
        busy.set()
    await asyncio.wait({given_up}, timeout=CALL_S)
    assert given_up.cancelled()
    assert await unpacker.unpacked(packed, 2 * MIB) == bytes(MIB)


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 12))
async def test_a_message_is_what_it_was_before_or_stays_as_it_is(
    content: bytes, cut: int, times: int
) -> None:
    """Either form gives the message back; half of one, or more than one, stays as it is."""
    content *= 2**times
    limit, unpacked = 300_000, Unpacker().unpacked
    for packed in (gzip.compress(content), zlib.compress(content)):
        assert packed[:1] in FIRST
        if len(content) > limit:
            with pytest.raises(ModelhostError):
                await unpacked(packed, limit)
            continue
        assert await unpacked(packed, limit) == content
        for other in (packed[: cut % len(packed)], packed + b"x", packed + packed):
            assert await unpacked(other, limit) == other
