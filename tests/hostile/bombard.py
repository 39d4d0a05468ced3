"""Damaged messages against a live daemon: sent side by side, and each answer judged by the oracle."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from modelhost._async.transport import own_status
from modelhost.oip import open_inference_pb2 as oip
from tests.api.support import CLIENT_OPTIONS, Failure
from tests.hostile.damage import of_control, of_inference, stream_of
from tests.hostile.judge import check_answer, plain, typed
from tests.hostile.oracle import MODEL, Takes, faults

SERVICE = "/inference.GRPCInferenceService/"
CALL_S = 60.0
SIDE_BY_SIDE = 32
"""Calls under way at one time."""
STREAM_MESSAGES = 100
"""Messages of one stream: more than it has at work at one time."""
SHOWN = 400
"""Bytes of a message that an error shows."""
UNEXPECTED = "internal error"
"""What an INTERNAL says of itself, also where no status goes with it."""


@dataclass
class Outcome:
    """What came of all messages: ``judged`` of each method, ``codes`` of the calls, answers of a bystander."""

    judged: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    bystander: int = 0


async def bombard(
    target: str, model: str, neighbour: str, counts: Mapping[str, int], seed: int
) -> Outcome:
    """Send damaged requests of each method, ``counts`` says how many, while a bystander uses ``neighbour``.

    Fails at the first answer that is not one of the contract, or not of the right model.
    """
    outcome = Outcome()
    chance = random.Random(seed)
    async with grpc.aio.insecure_channel(target, options=CLIENT_OPTIONS) as channel:
        # As it was: what is sent here changes the model's config, too.
        load = oip.RepositoryModelLoadRequest(model_name=model)
        load.parameters["config"].string_param = '{"max_batch_size": null}'
        await channel.unary_unary(SERVICE + "RepositoryModelLoad")(load.SerializeToString())
        stop = asyncio.Event()
        watching = asyncio.create_task(_stand_by(channel, neighbour, outcome, stop))
        inference, control = of_inference(model), of_control(model)
        known = dict.fromkeys((model, neighbour), Takes())
        for method, count in counts.items():
            good = [one.SerializeToString() for one in control.get(method, ())] or inference
            messages = stream_of(good, count, chance)
            if method == "ModelStreamInfer":
                await _streams(channel, messages, outcome, known)
            else:
                await _calls(channel, method, messages, outcome, known)
        stop.set()
        await watching
    return outcome


async def _calls(
    channel: grpc.aio.Channel,
    method: str,
    messages: Iterator[bytes],
    outcome: Outcome,
    known: Mapping[str, Takes],
) -> None:
    call = channel.unary_unary(SERVICE + method)

    async def go_on() -> None:
        for message in messages:  # one iterator: each message is taken once
            answer, failure = b"", None
            try:
                answer = await call(message, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                failure = typed(error)
            if method == "ModelInfer":
                _judge(message, answer, failure, known)
            outcome.codes[failure.code.name if failure is not None else "OK"] += 1
            outcome.judged[method] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(SIDE_BY_SIDE):
            tasks.create_task(go_on())


async def _streams(
    channel: grpc.aio.Channel,
    messages: Iterator[bytes],
    outcome: Outcome,
    known: Mapping[str, Takes],
) -> None:
    call = channel.stream_stream(SERVICE + "ModelStreamInfer")

    async def go_on() -> None:
        while some := list(itertools.islice(messages, STREAM_MESSAGES)):
            answers = call(_each(some), timeout=CALL_S)
            told = own_status(answers)
            for message in some:
                try:
                    data = await answers.read()
                except grpc.aio.AioRpcError as error:
                    raise AssertionError(f"the stream ended: {told(error)}") from error
                answer = oip.ModelStreamInferResponse.FromString(data)
                _judge_in_band(message, answer, known)
                outcome.codes["in band" if answer.error_message else "OK"] += 1
                outcome.judged["ModelStreamInfer"] += 1
            assert await answers.read() is grpc.aio.EOF, "more answers than requests"
            assert await answers.code() is grpc.StatusCode.OK

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(go_on())


def _judge(
    message: bytes, answer: bytes, failure: Failure | None, known: Mapping[str, Takes]
) -> None:
    """Compare what came with what the oracle says of the message."""
    wrong = faults(plain(message), known)
    if failure is None:
        assert not wrong, f"answered in spite of {wrong}: {message[:SHOWN]!r}"
        check_answer(message, answer)
    elif failure.reason == "MODEL_NOT_FOUND":
        assert MODEL in wrong, f"{failure.message}, not {wrong}: {message[:SHOWN]!r}"
    elif failure.reason == "DEADLINE_EXCEEDED":
        assert b"timeout" in plain(message)
    else:
        assert failure.reason == "INVALID_ARGUMENT", f"{failure.message}: {message[:SHOWN]!r}"
        assert failure.metadata["field"] in wrong, (
            f"{failure.message}, not {wrong}: {message[:SHOWN]!r}"
        )


def _judge_in_band(
    message: bytes, answer: oip.ModelStreamInferResponse, known: Mapping[str, Takes]
) -> None:
    if not answer.error_message:
        _judge(message, answer.infer_response.SerializeToString(), None, known)
        return
    assert answer.error_message.isprintable()
    assert UNEXPECTED not in answer.error_message
    assert b"timeout" in plain(message) or faults(plain(message), known), (
        f"{answer.error_message}: {message[:SHOWN]!r}"
    )


async def _each(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def _stand_by(
    channel: grpc.aio.Channel, neighbour: str, outcome: Outcome, stop: asyncio.Event
) -> None:
    """Use another model of the same worker all the time: each answer must be the right one."""
    infer = channel.unary_unary(SERVICE + "ModelInfer")
    request = oip.ModelInferRequest(model_name=neighbour)
    request.inputs.add(name="x", datatype="INT64", shape=[1])
    while not stop.is_set():
        request.id = str(outcome.bystander)
        content = outcome.bystander.to_bytes(8, "little")
        request.raw_input_contents[:] = [content]
        answer = oip.ModelInferResponse.FromString(
            await infer(request.SerializeToString(), timeout=CALL_S)
        )
        assert (answer.model_name, answer.id) == (neighbour, request.id)
        assert answer.raw_output_contents == [content]
        outcome.bystander += 1
