"""Requests that wait together, through a real worker process: run together, answered each for itself."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest

from modelhostd.core.errors import ModelhostError, Reason
from tests.support import DEADLINE_S, wait_until_async
from tests.worker.harness import CONFIG, decode, encode, ignore, running, spec, started


def batched(model="m", *, limit=None, delay_s=None, dynamic=None):
    """Return what loads the trouble backend so that it takes items of several requests at once."""
    made = spec(model, backend="trouble", batched=True)
    config = dataclasses.replace(
        made.config, max_batch_size=limit, max_batch_delay_s=delay_s, dynamic_batching=dynamic
    )
    return dataclasses.replace(made, config=config)


def rows(*values):
    """Return FP32 [n, 2] with each value twice."""
    return np.array([[value, value] for value in values], np.float32)


class Scene:
    """A worker with one model at work, behind which requests pile up until ``open``.

    ``queued`` is what its heartbeats said, one after the other, of how many wait.
    """

    def __init__(self, workers, gate, queued):
        self.workers = workers
        self.gate = gate
        self.queued = queued

    def send(self, *values, model="m", priority=0, timeout_s=None, name="x", **parameters):
        """Send a request with an item for each value."""
        payload = encode({name: rows(*values)}, name=model, parameters=parameters)
        return self.workers.infer(
            "cpu", f"{model}-1", 1, payload, timeout_s=timeout_s, priority=priority
        )

    async def block(self, model="m"):
        """Have the model work until ``open``."""
        self.first = self.send(0, model=model, do=f"wait:{self.gate}")
        await wait_until_async(lambda: started(self.gate) == 1)

    async def open(self, *, behind=0):
        """Let the work end, once so many requests wait behind it: what is sent is not there yet."""
        await wait_until_async(lambda: not behind or behind in self.queued, what=f"{behind} wait")
        self.gate.touch()
        await self.first


@pytest.fixture
async def scene(tmp_path, queued):
    async with running() as (workers, _):
        yield Scene(workers, tmp_path / "gate", queued)


def sizes(replies):
    """Return how large the batch of each answer was."""
    return [reply.batch_size for reply in replies]


def firsts(reply):
    """Return the first column of an answer."""
    return decode(reply.payload)[1]["x"][:, 0].tolist()


async def test_an_idle_model_answers_at_once_and_alone(scene):
    """Nothing waits for company unless it is told to."""
    loaded = await scene.workers.load("cpu", batched(), ignore)
    assert loaded.dynamic_batching
    reply = await scene.send(1, 2)
    assert (reply.item_count, reply.batch_size, firsts(reply)) == (2, 2, [1, 2])


async def test_what_waited_runs_together_and_each_gets_its_own_items(scene):
    """Requests that came while the model was at work are one execution; answers, counts and names are their own."""
    await scene.workers.load("cpu", batched(), ignore)
    await scene.block()
    replies = [scene.send(*range(10 * n, 10 * n + n)) for n in (1, 2, 3)]
    await scene.open(behind=3)
    got = await asyncio.gather(*replies)
    assert sizes(got) == [6, 6, 6]
    assert [reply.item_count for reply in got] == [1, 2, 3]
    assert [firsts(reply) for reply in got] == [[10], [20, 21], [30, 31, 32]]
    assert len({reply.infer_ns for reply in got}) == 1
    assert scene.first.result().batch_size == 1


async def test_only_what_is_alike_runs_together(scene):
    """Other parameters, names, types or shapes keep requests apart; scheduling parameters do not."""
    await scene.workers.load("cpu", batched(), ignore)
    await scene.block()
    other = encode({"x": np.zeros((1, 3), np.float32)})
    replies = [
        scene.send(1),
        scene.send(2, timeout=5_000_000),
        scene.send(3, top=1),
        scene.send(4, top="1"),
        scene.send(5, name="y"),
        scene.workers.infer("cpu", "m-1", 1, other, timeout_s=None),
    ]
    await scene.open(behind=6)
    assert sizes(await asyncio.gather(*replies)) == [2, 2, 1, 1, 1, 1]


async def test_a_batch_holds_no_more_items_than_it_may(scene):
    """The model's limit bounds what runs together, counted in items."""
    await scene.workers.load("cpu", batched(limit=4), ignore)
    await scene.block()
    replies = [scene.send(1, 2), scene.send(3, 4, 5), scene.send(6), scene.send(7), scene.send(8)]
    await scene.open(behind=5)
    assert sizes(await asyncio.gather(*replies)) == [4, 4, 4, 4, 4]


async def test_a_bad_item_fails_alone(scene):
    """When one request makes a batch fail, the others are answered as if it had not been there."""
    await scene.workers.load("cpu", batched(), ignore)
    await scene.block()
    replies = [scene.send(1), scene.send(float("nan")), scene.send(3)]
    await scene.open(behind=3)
    one, bad, three = await asyncio.gather(*replies, return_exceptions=True)
    assert (firsts(one), firsts(three)) == ([1], [3])
    assert isinstance(bad, ModelhostError)
    assert bad.reason is Reason.INFERENCE_FAILED


async def test_what_cannot_be_parsed_fails_alone(scene):
    """A request that is refused before it runs does not keep those beside it from running together."""
    await scene.workers.load("cpu", batched(limit=8), ignore)
    await scene.block()
    replies = [
        scene.workers.infer("cpu", "m-1", 1, b"\xff\xff", timeout_s=None),
        scene.send(1),
        scene.send(*range(9)),
        scene.send(2),
    ]
    await scene.open(behind=4)
    broken, one, large, two = await asyncio.gather(*replies, return_exceptions=True)
    assert sizes([one, two]) == [2, 2]
    assert {broken.reason, large.reason} == {Reason.INVALID_ARGUMENT}


async def test_who_has_gone_is_not_run(scene):
    """A cancelled request and one whose deadline has passed are left out, and told so."""
    await scene.workers.load("cpu", batched(), ignore)
    await scene.block()
    cancelled, late, kept = scene.send(1), scene.send(2, timeout_s=0.01), scene.send(3)
    cancelled.cancel()
    await wait_until_async(lambda: scene.workers._workers()[0].in_flight == 3)
    passed = time.monotonic() + 0.01
    await wait_until_async(lambda: time.monotonic() > passed)
    await scene.open()
    assert (await kept).batch_size == 1
    with pytest.raises(ModelhostError) as caught:
        await late
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_priorities_hold_across_batches(scene):
    """The most urgent request decides who runs first, and takes along who is next."""
    await scene.workers.load("cpu", batched(limit=2), ignore)
    await scene.block()
    order = []
    replies = []
    for value, priority in ((1, 0), (2, 0), (3, 9), (4, 5)):
        reply = scene.send(value, priority=priority)
        reply.add_done_callback(lambda _, value=value: order.append(value))
        replies.append(reply)
    await scene.open(behind=4)
    await asyncio.gather(*replies)
    assert (set(order[:2]), set(order[2:])) == ({3, 4}, {1, 2})


async def test_another_model_waits_for_one_batch_at_most(tmp_path, queued):
    """Fairness counts batches: a pile of one model's requests delays another's request by one of them."""
    config = dataclasses.replace(CONFIG, executor_threads=1)
    async with running(config) as (workers, _):
        scene = Scene(workers, tmp_path / "gate", queued)
        await workers.load("cpu", batched(limit=2), ignore)
        await workers.load("cpu", batched("other"), ignore)
        await scene.block()
        order = []
        replies = [scene.send(number) for number in range(11)]
        replies.append(scene.send(11, model="other"))
        for number, reply in enumerate(replies):
            reply.add_done_callback(lambda _, number=number: order.append(number))
        await scene.open(behind=12)
        await asyncio.gather(*replies)
        assert order.index(11) <= 2


async def test_with_a_delay_the_first_waits_for_company_until_the_batch_is_full(scene):
    """Two requests make a full batch, which then goes without waiting for the end of the delay."""
    await scene.workers.load("cpu", batched(limit=2, delay_s=10 * DEADLINE_S), ignore)
    first = scene.send(1)
    await wait_until_async(lambda: scene.workers._workers()[0].in_flight == 1)
    async with asyncio.timeout(DEADLINE_S):
        assert sizes(await asyncio.gather(first, scene.send(2))) == [2, 2]


async def test_a_delay_ends(scene):
    """Alone, a request runs when its time is up."""
    await scene.workers.load("cpu", batched(limit=8, delay_s=0.05), ignore)
    assert (await scene.send(1)).batch_size == 1


async def test_batching_can_be_switched_off(scene):
    """With dynamic_batching off each request is an execution of its own."""
    loaded = await scene.workers.load("cpu", batched(dynamic=False), ignore)
    assert not loaded.dynamic_batching
    await scene.block()
    replies = [scene.send(1), scene.send(2)]
    await scene.open(behind=2)
    assert sizes(await asyncio.gather(*replies)) == [1, 1]
