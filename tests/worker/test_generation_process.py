"""Text generation through a real worker process: streams, whole answers, cancellation, neighbours."""

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest
import pytest_asyncio

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.errors import ModelhostError, Reason
from tests.support import DEADLINE_S, wait_until_async
from tests.worker.generation_models import expected, flag, save_model, texts
from tests.worker.harness import CONFIG, encode, ignore, running, spec

# One worker for all of them: it takes seconds to import its libraries.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(540)]

LONG = 90
GENERATION = dataclasses.replace(
    CONFIG,
    backends=("text-generation", "identity", "trouble = tests.worker.trouble_backend:TroubleBackend"),
    start_timeout_s=120.0,
)  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(llama):
    async with running(GENERATION) as (made, _):
        load = spec("g", backend="text-generation", task="text-generation", model_dir=llama)
        made.loaded = await made.load("cpu", load, ignore)
        yield made


def request(prompt="hello", *, stream=True, model="g", **parameters):
    """Return an encoded request."""
    inputs = {"text_input": texts(prompt), "stream": flag(stream)}
    return encode(inputs, name=model, id=prompt[:5], parameters=parameters)


def text_of(reply):
    """Return a piece of text and why it ended."""
    message = oip.ModelInferResponse.FromString(reply.payload)
    raw = {o.name: r for o, r in zip(message.outputs, message.raw_output_contents, strict=True)}
    counts = (int(np.frombuffer(raw[f"num_{x}_tokens"], "<u4")[0]) for x in ("input", "output"))
    return raw["text_output"][4:], raw["finish_reason"][4:], *counts


def stream(workers, *given, timeout_s=None, **parameters):
    """Begin a stream."""
    payload = request(*given, **parameters)
    return workers.stream_infer("cpu", "g-1", 1, payload, timeout_s=timeout_s)


async def read(responses):
    """Return the text of a stream and its last piece's facts."""
    pieces = [text_of(reply) async for reply in responses]
    return b"".join(piece[0] for piece in pieces), pieces[-1][1:]


async def test_streams_and_whole_answers_side_by_side(workers, llama, tmp_path):
    """Several texts at once, streamed and whole, are what the library writes; the last piece says so."""
    model = save_model(tmp_path)
    assert workers.loaded.decoupled
    prompts = ["hello", "a longer prompt", "x"]
    whole = workers.infer("cpu", "g-1", 1, request("more", max_tokens=12), timeout_s=None)
    got = await asyncio.gather(*(read(stream(workers, p, max_tokens=12)) for p in prompts))
    for prompt, (text, facts) in zip(prompts, got, strict=True):
        want, count = expected(model, tmp_path, prompt, 12)
        assert text == want
        assert facts[1:] == (len(prompt), count)
    reply = await whole
    assert text_of(reply)[0] == expected(model, tmp_path, "more", 12)[0]
    assert (reply.item_count, reply.batch_size) == (1, 1)
    assert reply.infer_ns > 0
    assert workers._workers()[0].in_flight == 0


async def test_only_the_last_response_says_that_it_is_the_last(workers):
    """The daemon is told which response ends a stream."""
    replies = [reply async for reply in stream(workers, max_tokens=20)]
    assert [reply.last for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert [reply.item_count for reply in replies] == [1] + [0] * (len(replies) - 1)


async def test_a_reader_that_leaves_frees_its_place(workers):
    """Leaving a stream ends its text in the worker, between two tokens, whether it was read or not."""
    (worker,) = workers._workers()
    for read_some in (True, False):
        responses = stream(workers, max_tokens=LONG, ignore_eos="true")
        await anext(responses)
        if read_some:
            await anext(responses)
        await responses.aclose()
        await wait_until_async(lambda: worker.in_flight == 0)
    cancelled = workers.infer("cpu", "g-1", 1, request(max_tokens=LONG), timeout_s=None)
    cancelled.cancel()
    await wait_until_async(lambda: worker.in_flight == 0)


async def test_a_reader_that_pauses_gets_the_whole_text(workers):
    """A stream that is not read for a while stops at its credit, holds up nobody, and goes on."""
    want, _ = await read(stream(workers, max_tokens=60))
    slow = stream(workers, max_tokens=60)
    first = text_of(await anext(slow))[0]
    assert (await read(stream(workers, max_tokens=60)))[0] == want
    rest, _ = await read(slow)
    assert first + rest == want


async def test_bad_requests_are_refused_and_the_others_go_on(workers):
    """Unknown parameters and prompts above the context fail alone, streamed or not."""
    good = asyncio.ensure_future(read(stream(workers, max_tokens=30)))
    for payload in (request(colour="red"), request("x" * 200)):
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "g-1", 1, payload, timeout_s=None)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert caught.value.metadata["expected"]
        with pytest.raises(ModelhostError):
            await read(workers.stream_infer("cpu", "g-1", 1, payload, timeout_s=None))
    assert (await good)[0]


async def test_a_deadline_ends_a_text(workers):
    """A text that takes longer than its request's time ends with DEADLINE_EXCEEDED."""
    with pytest.raises(ModelhostError) as caught:
        await read(stream(workers, max_tokens=LONG, timeout_s=0.003))
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_deadline_ends_a_text_that_nobody_reads(workers):
    """A stream that rests, because its reader does, is ended when its time is up."""
    (worker,) = workers._workers()
    responses = stream(workers, max_tokens=LONG, ignore_eos="true", timeout_s=2.0)
    with contextlib.suppress(ModelhostError):
        # On a machine that is swamped the time may be up before.
        await anext(responses)
    await wait_until_async(lambda: worker.in_flight == 0)
    await responses.aclose()


async def test_generating_does_not_hold_up_a_neighbour(workers):
    """Another model of the worker answers while texts are generated: it waits for a token, not for a text."""
    await workers.load("cpu", spec("other", backend="trouble"), ignore)
    streams = [stream(workers, max_tokens=LONG, ignore_eos="true") for _ in range(6)]
    for one in streams:
        await anext(one)
    payload = encode({"x": np.zeros(1, np.float32)}, name="other")
    async with asyncio.timeout(DEADLINE_S):
        await workers.infer("cpu", "other-1", 1, payload, timeout_s=None)
    for one in streams:
        await one.aclose()


async def test_unloading_ends_streams_and_finishes_whole_answers(workers, llama):
    """An instance that goes tells its streams so; who waits for one answer still gets it."""
    load = spec("u", backend="text-generation", task="text-generation", model_dir=llama)
    await workers.load("cpu", load, ignore)
    payload = request(max_tokens=LONG, ignore_eos="true", model="u")
    streams = [workers.stream_infer("cpu", "u-1", 1, payload, timeout_s=None) for _ in range(2)]
    for one in streams:
        await anext(one)
    whole = workers.infer("cpu", "u-1", 1, payload, timeout_s=None)
    async with asyncio.timeout(DEADLINE_S):
        await workers.unload("cpu", "u-1", 1)
    (answer,) = await asyncio.gather(whole, return_exceptions=True)
    if isinstance(answer, ModelhostError):
        # It had not begun yet.
        assert answer.reason is Reason.MODEL_NOT_LOADED
    else:
        assert text_of(answer)[0]
    for one in streams:
        with pytest.raises(ModelhostError) as caught:
            await read(one)
        assert caught.value.reason is Reason.MODEL_NOT_LOADED


async def test_a_health_check_takes_its_turn_between_tokens(workers):
    """A model is checked while it generates."""
    one = stream(workers, max_tokens=LONG, ignore_eos="true")
    await anext(one)
    health, message = await workers.check("cpu", "g-1", 1)
    assert health.name == "HEALTHY", message
    await one.aclose()


async def test_a_model_that_came_back_from_host_memory_writes_the_same(workers, llama):
    """Demoted and promoted on a device with slabs, it goes on as before, streams included."""
    load = spec("s", backend="text-generation", task="text-generation", model_dir=llama)
    loaded = await workers.load("sim-0", load, ignore)
    assert loaded.host_bytes > 0
    payload = request(max_tokens=20, model="s")

    async def write():
        return await read(workers.stream_infer("sim-0", "s-1", 1, payload, timeout_s=None))

    before = await write()
    for _ in range(2):
        assert await workers.demote("sim-0", "s-1", 1) == loaded.host_bytes
        with pytest.raises(ModelhostError) as caught:
            await write()
        assert caught.value.reason is Reason.MODEL_NOT_LOADED
        await workers.promote("sim-0", "s-1", 1, ignore)
        assert await write() == before
