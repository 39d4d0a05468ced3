"""Several responses to one request: order, credit, the end, errors in the middle, leaving early."""

import asyncio

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from tests.support import wait_until_async
from tests.worker.harness import DEADLINE_S, decode, encode, ignore, running, spec


def stream(workers, **parameters):
    """Ask the trouble backend for a stream."""
    payload = encode({}, parameters=parameters)
    return workers.stream_infer("cpu", "m-1", 1, payload, timeout_s=None)


async def test_responses_come_in_order_and_end():
    """Far more responses than the window holds arrive, each once, in order."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        got = [decode(reply.payload)[1]["number"][0] async for reply in stream(workers, count=100)]
        assert got == list(range(100))


async def test_a_reader_that_does_not_read_stops_the_worker_not_its_neighbours(tmp_path):
    """Without credit the backend waits; when the reader leaves, it is told to stop."""
    note = tmp_path / "note"
    async with running() as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        await workers.load("cpu", spec("other"), ignore)
        responses = stream(workers, count=10**9, note=str(note))
        first = await anext(responses)
        assert decode(first.payload)[1]["number"][0] == 0
        await workers.infer("cpu", "other-1", 1, encode({}, name="other"), timeout_s=None)
        await responses.aclose()
        (worker,) = workers._workers()
        await wait_until_async(lambda: worker.in_flight == 0)
        assert listener.exits == []


async def test_an_error_in_the_middle_ends_the_stream_after_what_came_before():
    """What was sent before a failure arrives, then the failure, typed."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        got = []
        with pytest.raises(ModelhostError) as caught:
            async for reply in stream(workers, count=10, fail_at=4):
                got.append(decode(reply.payload)[1]["number"][0])  # noqa: PERF401 - it ends by raising
        assert got == [0, 1, 2, 3]
        assert caught.value.reason is Reason.INFERENCE_FAILED


async def test_a_stream_ends_with_its_worker():
    """A reader in the middle of a stream is told that the worker is gone."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        await workers.load("cpu", spec("killer", backend="trouble"), ignore)
        responses = stream(workers, count=10**9)
        await anext(responses)
        payload = encode({}, name="killer", parameters={"do": "kill:SIGKILL"})
        with pytest.raises(ModelhostError):
            await workers.infer("cpu", "killer-1", 1, payload, timeout_s=None)
        with pytest.raises(ModelhostError) as caught:
            async with asyncio.timeout(DEADLINE_S):
                async for _ in responses:
                    pass
        assert caught.value.reason is Reason.WORKER_LOST
        await listener.wait(exits=1, ready=2)


async def test_a_backend_without_streams_answers_once():
    """A backend that knows only single answers gives a stream of one."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(), ignore)
        assert len([reply async for reply in stream(workers)]) == 1


async def test_unloading_ends_a_stream_that_nobody_reads():
    """A reader that stays away does not keep a model's memory: its stream ends when the model goes."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        responses = stream(workers, count=10**9)
        await anext(responses)
        async with asyncio.timeout(DEADLINE_S):
            await workers.unload("cpu", "m-1", 1)
        with pytest.raises(ModelhostError) as caught:
            async for _ in responses:
                pass
        assert caught.value.reason is Reason.MODEL_NOT_LOADED
