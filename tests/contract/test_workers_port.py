"""What every implementation of the Workers port does, the real processes and the fake alike."""

import asyncio

import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Health, Isolation
from modelhostd.ports import Loaded
from tests.fakes.workers import FakeWorkers
from tests.worker.harness import (
    CONFIG,
    DEADLINE_S,
    Listener,
    ProcessWorkers,
    decode,
    encode,
    ignore,
    numbers,
    spec,
)

TROUBLE = {"backend": "trouble"}


@pytest.fixture(params=["fake", "real"])
async def workers(request):
    """Give each implementation, with a listener in ``.listener``."""
    made = FakeWorkers(answer) if request.param == "fake" else ProcessWorkers(CONFIG)
    made.listener = Listener()
    made.set_listener(made.listener)
    yield made
    async with asyncio.timeout(DEADLINE_S):
        await made.stop(1.0)
    assert dict(made.pids()) == {}


def answer(spec, payload):
    """Answer as the identity backend does."""
    request = oip.ModelInferRequest.FromString(payload)
    response = oip.ModelInferResponse(
        model_name=request.model_name, model_version=str(spec.version), id=request.id
    )
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    response.raw_output_contents.extend(request.raw_input_contents)
    return response.SerializeToString()


async def crash(workers):
    """Kill the one worker that runs."""
    if isinstance(workers, FakeWorkers):
        workers.crash("cpu")
    else:
        (worker,) = workers._workers()
        worker.kill("signal SIGKILL")


async def test_a_loaded_model_answers(workers):
    """After a load the instance answers, its worker is listed, and the listener has heard of it."""
    loaded = await workers.load("cpu", spec(), ignore)
    assert isinstance(loaded, Loaded)
    assert loaded.backend == "identity"
    reply = await workers.infer(
        "cpu", "m-1", 1, encode({"x": numbers(3)}, id="a"), timeout_s=DEADLINE_S
    )
    response, arrays = decode(reply.payload)
    assert (response.id, response.model_version) == ("a", "1")
    assert arrays["x"].tolist() == [0, 1, 2]
    assert list(workers.pids().values()) == ["cpu"]
    assert workers.listener.ready == [("cpu", next(iter(workers.pids())))]


async def test_infer_answers_in_the_order_of_the_calls(workers):
    """Requests are sent when they are called, not when they are awaited."""
    await workers.load("cpu", spec(), ignore)
    replies = [
        workers.infer("cpu", "m-1", 1, encode({"x": numbers(1)}, id=str(i)), timeout_s=None)
        for i in range(10)
    ]
    ids = [decode((await reply).payload)[0].id for reply in reversed(replies)]
    assert ids == [str(i) for i in reversed(range(10))]


async def test_what_is_not_loaded_is_typed(workers):
    """No worker is WORKER_LOST with a delay; an unknown instance or generation MODEL_NOT_LOADED."""
    with pytest.raises(ModelhostError) as caught:
        await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
    assert caught.value.reason is Reason.WORKER_LOST
    assert caught.value.retry_delay_s
    await workers.load("cpu", spec(generation=2), ignore)
    for instance, generation in (("m-1", 1), ("n-1", 2)):
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", instance, generation, encode({}), timeout_s=None)
        assert caught.value.reason is Reason.MODEL_NOT_LOADED


async def test_a_deadline_in_the_past_is_not_run(workers):
    """A request without time left is DEADLINE_EXCEEDED."""
    await workers.load("cpu", spec(), ignore)
    with pytest.raises(ModelhostError) as caught:
        await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=0)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_cancelled_request_is_cancelled_at_once(workers):
    """Cancelling frees the caller; the instance serves on."""
    await workers.load("cpu", spec(), ignore)
    reply = workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
    reply.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reply
    await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)


async def test_an_abort_ends_what_is_in_flight(workers):
    """Requests in flight in an aborted instance are CANCELLED at once; others, and what comes next, are answered."""
    for generation, model in ((1, "m"), (2, "n")):
        await workers.load("cpu", spec(model, generation=generation), ignore)
    replies = [
        workers.infer("cpu", f"{m}-1", g, encode({}, name=m), timeout_s=None)
        for g, m in ((1, "m"), (1, "m"), (2, "n"))
    ]
    workers.abort("cpu", "m-1", 1)
    workers.abort("cpu", "never", 9)
    for reply in replies[:2]:
        with pytest.raises(ModelhostError) as caught:
            await reply
        assert caught.value.reason is Reason.CANCELLED
    await replies[2]
    await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)


async def test_unload_is_idempotent_and_final(workers):
    """After an unload the instance is unknown; unloading it again, or what never was, does nothing."""
    await workers.load("cpu", spec(), ignore)
    for instance in ("m-1", "m-1", "never"):
        await workers.unload("cpu", instance, 1)
    with pytest.raises(ModelhostError) as caught:
        await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
    assert caught.value.reason is Reason.MODEL_NOT_LOADED
    await workers.load("cpu", spec(generation=2), ignore)
    await workers.infer("cpu", "m-1", 2, encode({}), timeout_s=None)


async def test_a_check_is_healthy_only_for_what_is_there(workers):
    """A loaded instance is HEALTHY, anything else UNHEALTHY, always with a sentence."""
    await workers.load("cpu", spec(), ignore)
    health, why = await workers.check("cpu", "m-1", 1)
    assert (health, bool(why)) == (Health.HEALTHY, True)
    health, why = await workers.check("cpu", "m-1", 9)
    assert (health, bool(why)) == (Health.UNHEALTHY, True)


async def test_a_crash_fails_what_was_in_flight_then_tells_then_replaces(workers):
    """In flight is WORKER_LOST before the listener hears of the exit; a new, empty worker follows."""
    await workers.load("cpu", spec(), ignore)
    (pid,) = workers.pids()
    await crash(workers)
    await workers.listener.wait(exits=1, ready=2)
    (ended,) = workers.listener.exits
    assert (ended.device, ended.pid, ended.exit) == ("cpu", pid, "signal SIGKILL")
    assert pid not in workers.pids()
    with pytest.raises(ModelhostError) as caught:
        await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
    assert caught.value.reason is Reason.MODEL_NOT_LOADED
    await workers.load("cpu", spec(generation=2), ignore)
    await workers.infer("cpu", "m-1", 2, encode({}), timeout_s=None)


async def test_an_isolated_model_has_a_worker_of_its_own(workers):
    """Process isolation gives a second process on the same device, which serves like any other."""
    await workers.load("cpu", spec("shared"), ignore)
    await workers.load("cpu", spec("alone", isolation=Isolation.PROCESS), ignore)
    assert list(workers.pids().values()) == ["cpu", "cpu"]
    for model in ("shared", "alone"):
        payload = encode({}, name=model)
        await workers.infer("cpu", f"{model}-1", 1, payload, timeout_s=None)


async def test_a_cancelled_load_holds_nothing(workers):
    """A load that is cancelled while its worker starts leaves an instance that can be loaded again."""
    load = asyncio.create_task(workers.load("cpu", spec(), ignore))
    await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    await workers.load("cpu", spec(generation=2), ignore)
    await workers.infer("cpu", "m-1", 2, encode({}), timeout_s=None)


async def test_after_stop_nothing_is_served(workers):
    """Stop ends every worker; what is asked later is SHUTTING_DOWN."""
    await workers.load("cpu", spec(), ignore)
    async with asyncio.timeout(DEADLINE_S):
        await workers.stop(1.0)
    assert dict(workers.pids()) == {}
    with pytest.raises(ModelhostError) as caught:
        await workers.load("cpu", spec(generation=2), ignore)
    assert caught.value.reason is Reason.SHUTTING_DOWN
    assert workers.listener.exits == []


async def test_a_stream_of_a_model_that_answers_once_has_one_response(workers):
    """Streams work with every model, and what is not there is typed as for single requests."""
    await workers.load("cpu", spec(), ignore)
    payload = encode({"x": numbers(3)}, id="a")
    replies = [
        r async for r in workers.stream_infer("cpu", "m-1", 1, payload, timeout_s=DEADLINE_S)
    ]
    (only,) = replies
    assert decode(only.payload)[0].id == "a"
    with pytest.raises(ModelhostError) as caught:
        async for _ in workers.stream_infer("cpu", "n-1", 1, payload, timeout_s=None):
            pass
    assert caught.value.reason is Reason.MODEL_NOT_LOADED
