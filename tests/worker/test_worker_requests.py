"""Requests through a real worker process: payloads of every size, cancellation, deadlines, errors."""

import asyncio
import dataclasses

import numpy as np
import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ModelConfig
from modelhostd.ports import LoadSpec
from tests.support import wait_until_async
from tests.worker.harness import CONFIG, decode, encode, ignore, numbers, running, spec, started

KIB = 1024
MIB = 2**20


@pytest.mark.parametrize(
    "size",
    [0, 4, 64 * KIB - 400, 64 * KIB, MIB, 16 * MIB, 40 * MIB],
    ids=["empty", "one", "last-inline", "first-arena", "1MiB", "over-the-arena", "far-over"],
)
async def test_a_payload_comes_back_as_it_went(size):
    """Whatever its way (frame, arena, several frames), a payload arrives byte for byte."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(), ignore)
        sent = numbers(size // 4)
        reply = await workers.infer("cpu", "m-1", 1, encode({"x": sent}, id="7"), timeout_s=None)
        response, arrays = decode(reply.payload)
        assert np.array_equal(arrays["x"], sent)
        assert (response.model_name, response.model_version, response.id) == ("m", "1", "7")
        assert reply.item_count == 1


async def test_many_sizes_at_once_all_come_back():
    """Small, large and oversized requests in flight together do not mix, starve or deadlock."""
    sizes = [1, 40_000, 300_000, 1_500_000, 10, 2_000_000, 100_000, 5] * 5
    async with running() as (workers, _):
        await workers.load("cpu", spec(), ignore)
        arrays = [numbers(size) + index for index, size in enumerate(sizes)]
        replies = await asyncio.gather(
            *(
                workers.infer("cpu", "m-1", 1, encode({"x": array}, id=str(i)), timeout_s=None)
                for i, array in enumerate(arrays)
            )
        )
        for index, (reply, sent) in enumerate(zip(replies, arrays, strict=True)):
            response, received = decode(reply.payload)
            assert response.id == str(index)
            assert np.array_equal(received["x"], sent)
        assert worker_of(workers).slots_taken == 0
        assert worker_of(workers).in_flight == 0


async def test_a_small_request_passes_large_ones_that_are_still_being_sent():
    """A request over the arena's size is sent in pieces, between which a small one goes ahead."""
    async with running() as (workers, _):
        await workers.load("cpu", spec("big"), ignore)
        await workers.load("cpu", spec("small"), ignore)
        order = []
        large = workers.infer(
            "cpu", "big-1", 1, encode({"x": numbers(12 * MIB)}, name="big"), timeout_s=None
        )
        small = workers.infer(
            "cpu", "small-1", 1, encode({"x": numbers(4)}, name="small"), timeout_s=None
        )
        large.add_done_callback(lambda _: order.append("large"))
        small.add_done_callback(lambda _: order.append("small"))
        await asyncio.gather(large, small)
        assert order == ["small", "large"]


async def test_sending_happens_before_the_call_returns(tmp_path):
    """Requests reach one instance in the order of the calls, though nobody awaited in between."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        done = []
        replies = []
        for index in range(50):
            payload = encode({"x": numbers(1)})
            reply = workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
            reply.add_done_callback(lambda _, index=index: done.append(index))
            replies.append(reply)
        await asyncio.gather(*replies)
        assert done == list(range(50))


async def test_a_higher_priority_overtakes_within_its_instance(tmp_path, queued):
    """Of the requests that wait for one instance, the one with the higher priority runs first."""
    gate = tmp_path / "gate"
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        first = waiting(workers, gate)
        await wait_until_async(lambda: started(gate) == 1)
        order = []
        replies = []
        for priority in (0, 5, 1):
            reply = workers.infer(
                "cpu", "m-1", 1, encode({"x": numbers(1)}), timeout_s=None, priority=priority
            )
            reply.add_done_callback(lambda _, priority=priority: order.append(priority))
            replies.append(reply)
        # What is sent is not there yet.
        await wait_until_async(lambda: 3 in queued)
        gate.touch()
        await asyncio.gather(first, *replies)
        assert order == [5, 1, 0]


async def test_a_cancelled_request_that_waits_never_runs_and_frees_its_slot(tmp_path):
    """Cancelling before the start drops the request in the worker, and only then its slot is free."""
    gate, second_gate = tmp_path / "gate", tmp_path / "second"
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        first = waiting(workers, gate)
        await wait_until_async(lambda: started(gate) == 1)
        second = waiting(workers, second_gate, size=100_000)
        worker = worker_of(workers)
        assert worker.slots_taken == 1
        second.cancel()
        assert worker.slots_taken == 1
        await wait_until_async(lambda: worker.slots_taken == 0)
        gate.touch()
        await first
        assert started(second_gate) == 0
        with pytest.raises(asyncio.CancelledError):
            await second


async def test_a_cancelled_request_that_runs_stops_at_its_next_check(tmp_path):
    """Cancelling reaches a backend in the middle of its work; its slot is taken until it stopped."""
    gate = tmp_path / "gate"
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        request = waiting(workers, gate, size=100_000)
        await wait_until_async(lambda: started(gate) == 1)
        worker = worker_of(workers)
        assert (worker.slots_taken, worker.in_flight) == (1, 1)
        request.cancel()
        await wait_until_async(lambda: worker.in_flight == 0)
        assert worker.slots_taken == 0
        assert not gate.exists()


async def test_cancellation_storms_leave_nothing_behind():
    """Hundreds of requests, cancelled at once, all end with their slots free and the worker in use."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec(), ignore)
        for size in (4, 30_000, 400_000, 1_500_000):
            payload = encode({"x": numbers(size)})
            replies = [workers.infer("cpu", "m-1", 1, payload, timeout_s=None) for _ in range(40)]
            for reply in replies[::2]:
                reply.cancel()
            results = await asyncio.gather(*replies, return_exceptions=True)
            assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 20
        await wait_until_async(lambda: worker_of(workers).in_flight == 0)
        assert worker_of(workers).slots_taken == 0
        assert listener.exits == []


async def test_a_deadline_that_passes_in_the_queue_is_answered_without_running(tmp_path):
    """A request whose time is up when its turn comes gets DEADLINE_EXCEEDED and is never run."""
    gate, late_gate = tmp_path / "gate", tmp_path / "late"
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        first = waiting(workers, gate)
        await wait_until_async(lambda: started(gate) == 1)
        late = waiting(workers, late_gate, timeout_s=0.001)
        late_at = asyncio.get_running_loop().time() + 0.001
        barrier = workers.infer(
            "cpu", "m-1", 1, encode({"x": numbers(1)}), timeout_s=None, priority=-1
        )
        await wait_until_async(lambda: asyncio.get_running_loop().time() > late_at)
        gate.touch()
        await asyncio.gather(first, barrier)
        with pytest.raises(ModelhostError) as caught:
            await late
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        assert started(late_gate) == 0


async def test_a_deadline_that_passes_while_it_runs_stops_the_work(tmp_path):
    """A backend that looks at its context is stopped by the deadline, and the caller is told so."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        with pytest.raises(ModelhostError) as caught:
            await waiting(workers, tmp_path / "never", timeout_s=0.2)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED


@pytest.mark.parametrize("timeout_s", [0.0, -1.0], ids=str)
async def test_a_deadline_in_the_past_is_refused_at_once(timeout_s):
    """A request without time left is not sent."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(), ignore)
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=timeout_s)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_busy_model_does_not_hold_up_its_neighbour(tmp_path):
    """While one instance works and its queue is long, another's request is answered."""
    gate = tmp_path / "gate"
    async with running() as (workers, _):
        await workers.load("cpu", spec("busy", backend="trouble"), ignore)
        await workers.load("cpu", spec("idle"), ignore)
        busy = [waiting(workers, gate, model="busy") for _ in range(20)]
        await wait_until_async(lambda: started(gate) == 1)
        for _ in range(20):
            await workers.infer("cpu", "idle-1", 1, encode({}, name="idle"), timeout_s=None)
        assert not any(reply.done() for reply in busy)
        gate.touch()
        await asyncio.gather(*busy)


async def test_a_full_queue_is_refused_with_a_delay(tmp_path):
    """More requests than the limit are answered QUEUE_FULL at once, and the others still served."""
    gate = tmp_path / "gate"
    async with running(dataclasses.replace(CONFIG, queue_limit=5)) as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        await workers.load("cpu", spec("other", backend="trouble"), ignore)
        waiters = [waiting(workers, gate) for _ in range(3)]
        waiters += [waiting(workers, gate, model="other") for _ in range(2)]
        with pytest.raises(ModelhostError) as caught:
            await waiting(workers, gate)
        assert caught.value.reason is Reason.QUEUE_FULL
        assert caught.value.retry_delay_s
        gate.touch()
        await asyncio.gather(*waiters)


async def test_one_model_does_not_take_all_places_of_its_worker(tmp_path):
    """Three quarters of the limit are for one model; its next request is QUEUE_FULL and another model's is served."""
    gate = tmp_path / "gate"
    async with running(dataclasses.replace(CONFIG, queue_limit=8)) as (workers, _):
        await workers.load("cpu", spec("busy", backend="trouble"), ignore)
        await workers.load("cpu", spec("idle"), ignore)
        for _ in range(2):
            busy = [waiting(workers, gate, model="busy") for _ in range(6)]
            with pytest.raises(ModelhostError, match="6 requests of model 'busy'") as caught:
                await waiting(workers, gate, model="busy")
            assert caught.value.reason is Reason.QUEUE_FULL
            assert caught.value.retry_delay_s
            await workers.infer("cpu", "idle-1", 1, encode({}, name="idle"), timeout_s=None)
            gate.touch()
            await asyncio.gather(*busy)
            gate.unlink()


async def test_large_requests_beside_a_full_arena_are_bounded_in_bytes(tmp_path):
    """When the arena is full, large requests go on by frames, up to the limit of bytes in flight."""
    gate = tmp_path / "gate"
    config = dataclasses.replace(CONFIG, arena_bytes=MIB, inline_bytes=3 * MIB)
    async with running(config) as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        blocked = [waiting(workers, gate, size=200_000) for _ in range(4)]
        with pytest.raises(ModelhostError) as caught:
            await waiting(workers, gate, size=300_000)
        assert caught.value.reason is Reason.QUEUE_FULL
        assert worker_of(workers).slots_taken == 1
        gate.touch()
        await asyncio.gather(*blocked)
        await waiting(workers, gate, size=700_000)


async def test_a_message_over_the_limit_is_refused_both_ways():
    """A request over the limit is not sent, and a response over it becomes an error."""
    config = dataclasses.replace(CONFIG, max_message_bytes=MIB)
    async with running(config) as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        for request in (
            encode({"x": numbers(MIB // 4)}),
            encode({}, parameters={"do": f"grow:{2 * MIB}"}),
        ):
            with pytest.raises(ModelhostError) as caught:
                await workers.infer("cpu", "m-1", 1, request, timeout_s=None)
            assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
            assert caught.value.metadata["limitBytes"] == str(MIB)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raise", Reason.INFERENCE_FAILED),
        ("system-exit", Reason.INFERENCE_FAILED),
        ("nonsense", Reason.INFERENCE_FAILED),
        ("memory", Reason.OUT_OF_DEVICE_MEMORY),
    ],
)
async def test_what_a_backend_raises_becomes_one_typed_error(what, reason):
    """A backend's failure is told without its text, and the worker serves on."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        with pytest.raises(ModelhostError) as caught:
            await workers.infer(
                "cpu", "m-1", 1, encode({}, parameters={"do": what}), timeout_s=None
            )
        assert caught.value.reason is reason
        assert caught.value.metadata["model"] == "m"
        assert "secret" not in caught.value.message
        await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
        assert listener.exits == []


async def test_a_request_for_an_instance_that_is_not_there_says_so():
    """Unknown instance and old generation are MODEL_NOT_LOADED; no worker at all is WORKER_LOST."""
    async with running() as (workers, _):
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
        assert caught.value.reason is Reason.WORKER_LOST
        await workers.load("cpu", spec(generation=3), ignore)
        for instance, generation in (("other", 3), ("m-1", 2)):
            with pytest.raises(ModelhostError) as caught:
                await workers.infer("cpu", instance, generation, encode({}), timeout_s=None)
            assert caught.value.reason is Reason.MODEL_NOT_LOADED


async def test_a_payload_that_names_another_model_is_refused():
    """The worker's own parse decides: where it disagrees with the route, nothing is run."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(), ignore)
        twice = encode({}, name="m") + encode({}, name="other")
        for payload in (encode({}, name="other"), twice):
            with pytest.raises(ModelhostError) as caught:
                await workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
            assert caught.value.reason is Reason.INVALID_ARGUMENT
            assert caught.value.metadata["field"] == "model_name"
        slot = encode({}, name="image-gen")
        reply = await workers.infer("cpu", "m-1", 1, slot, timeout_s=None, name="image-gen")
        assert decode(reply.payload)[0].model_name == "image-gen"


async def test_times_and_counts_come_with_the_answer(tmp_path):
    """An answer says how many items it had and where its time went."""
    (tmp_path / "scale.json").write_text('{"factor": 2}')
    async with running() as (workers, _):
        config = ModelConfig(backend="example")
        load = LoadSpec("m", "m-1", 1, 1, tmp_path, "example-scaling", config, 0)
        loaded = await workers.load("cpu", load, ignore)
        assert loaded.measured_bytes == 16
        payload = encode({"x": np.ones((3, 4), np.float32)})
        reply = await workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
        assert np.array_equal(decode(reply.payload)[1]["y"], np.full((3, 4), 2, np.float32))
        assert (reply.item_count, reply.batch_size) == (3, 3)
        assert min(reply.queue_ns, reply.input_ns, reply.infer_ns, reply.output_ns) > 0


def waiting(workers, gate, *, model="m", size=1, timeout_s=None):
    """Send a request that runs until ``gate`` is there."""
    payload = encode({"x": numbers(size)}, name=model, parameters={"do": f"wait:{gate}"})
    return workers.infer("cpu", f"{model}-1", 1, payload, timeout_s=timeout_s)


def worker_of(workers):
    """Return the one worker that runs."""
    (worker,) = workers._workers()
    return worker
