"""The inference service with anything in its messages, against a real worker that must live on."""

from collections.abc import Iterator, Sequence

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelhost.oip import open_inference_pb2 as oip
from tests.hostile.bombard import bombard
from tests.hostile.damage import of_control
from tests.hostile.judge import check_answer, typed
from tests.hostile.live import CALL_S, Live, live
from tests.hostile.messages import entry, mutated, payloads
from tests.hostile.profile import examples, new_seed

EXAMPLES = 600
STREAMS = 100
UNARY, STREAMED, CONTROL = 8_000, 9_500, 2_500
assert UNARY + STREAMED + CONTROL >= 20_000

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
MODELS = ("m", "dear")

_SIZES = {"BOOL": 1, "UINT8": 1, "INT16": 2, "BF16": 2, "FP32": 4, "INT64": 8, "FP64": 8}


@pytest.fixture(scope="module")
def at() -> Iterator[Live]:
    """Start a daemon with two models in one worker, which all of these tests share."""
    with live(models=MODELS) as running:
        yield running


def raw(name: str, tensors: Sequence[tuple[str, int]]) -> oip.ModelInferRequest:
    """Make a request that works: some tensors as raw contents."""
    made = oip.ModelInferRequest(model_name=name, id="7")
    for number, (datatype, count) in enumerate(tensors):
        made.inputs.add(name=f"in{number}", datatype=datatype, shape=[count])
        made.raw_input_contents.append(bytes(range(200))[:count] * _SIZES[datatype])
    return made


def typed_contents(name: str) -> oip.ModelInferRequest:
    """Make a request that works: contents of their own types, and parameters."""
    made = oip.ModelInferRequest(model_name=name, model_version="1")
    made.inputs.add(name="f", datatype="FP32", shape=[2]).contents.fp32_contents.extend([1.0, 2.0])
    made.inputs.add(name="b", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    made.outputs.add(name="b")
    made.parameters["timeout"].int64_param = 5_000_000
    made.parameters["mine"].string_param = "x"
    return made


GOOD = [
    raw("m", [("FP32", 4)]),
    raw("dear", [("UINT8", 3), ("BOOL", 2)]),
    raw("m", [("INT16", 0), ("BF16", 5), ("FP64", 1)]),
    typed_contents("dear"),
]

names = st.sampled_from([b"m", b"dear", b"none", b"", b"M", b"m\0"]).map(lambda n: entry(1, n))
requests = st.one_of(
    payloads(oip.ModelInferRequest.DESCRIPTOR, GOOD),
    # Two names, before and behind: the last of them counts, for whoever reads it.
    st.builds(lambda before, good, after: before + good.SerializeToString() + after,
              names, st.sampled_from(GOOD), names),
    st.builds(lambda good, name, tail: good.SerializeToString() + name + tail,
              st.sampled_from(GOOD), names, st.binary(max_size=6)),
    # Large enough to go by the arena.
    mutated(raw("m", [("FP32", 100)]).SerializeToString() + entry(99, bytes(80_000))),
)  # fmt: skip


def test_any_request_is_answered_by_the_model_that_it_names(at: Live) -> None:
    """Hundreds of damaged requests: an answer of the right model or a typed error, and no crash."""
    answered = 0
    infer = at.channel.unary_unary(INFER)

    @settings(
        max_examples=examples(EXAMPLES), suppress_health_check=list(HealthCheck), database=None
    )
    @given(requests)
    def attempt(request: bytes) -> None:
        nonlocal answered
        try:
            reply = infer(request, timeout=CALL_S)
        except grpc.RpcError as error:
            typed(error)
            return
        answered += 1
        check_answer(request, reply)

    attempt()
    # Else it would be refused at the door, and the worker be spared.
    assert answered > examples(EXAMPLES) // 10
    at.check_alive()
    at.check_log()
    assert at.worker_pids() == at.workers


def test_each_request_of_a_stream_has_one_answer_whatever_it_holds(at: Live) -> None:
    """In a stream a wrong request is answered in band, in its place, and those behind it go on."""
    stream = at.channel.stream_stream(STREAM)

    @settings(
        max_examples=examples(STREAMS), suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.lists(requests, max_size=8))
    def attempt(asked: list[bytes]) -> None:
        whole = [*asked, GOOD[0].SerializeToString()]
        answers = [
            oip.ModelStreamInferResponse.FromString(data)
            for data in stream(iter(whole), timeout=CALL_S)
        ]
        assert len(answers) == len(whole)
        assert not answers[-1].error_message
        for request, answer in zip(whole, answers, strict=True):
            if answer.error_message:
                assert answer.error_message.isprintable()
                continue
            try:
                named = oip.ModelInferRequest.FromString(request).model_name
            except DecodeError:
                pytest.fail(f"an answer to what is no message: {request!r}")
            assert answer.infer_response.model_name == named

    attempt()
    at.check_alive()
    at.check_log()
    assert at.worker_pids() == at.workers


@pytest.mark.timeout(0)
async def test_twenty_thousand_damaged_messages_hurt_nobody(at: Live) -> None:
    """Each is answered by the model it names or refused in type; worker, daemon and neighbour go on."""
    methods = list(of_control("m"))
    counts = {
        "ModelInfer": examples(UNARY),
        "ModelStreamInfer": examples(STREAMED),
        **dict.fromkeys(methods, -(-examples(CONTROL) // len(methods))),
    }
    assert sum(counts.values()) >= examples(20_000)
    seed = new_seed()
    print(f"seed {seed}")  # shown where it fails: the same seed does the same damage
    outcome = await bombard(at.daemon.admin, "m", "dear", counts, seed)
    print(outcome)
    assert outcome.judged == counts
    codes = outcome.codes
    assert codes.total() == sum(counts.values())
    assert not codes.keys() & {"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE"}, codes
    # Else the damage were such that nothing got past the door, or none of it were damage.
    assert codes["OK"] > counts["ModelInfer"] // 10
    assert codes["INVALID_ARGUMENT"] > counts["ModelInfer"] // 10
    assert outcome.bystander > 0
    at.check_alive()
    at.check_log()
    assert at.worker_pids() == at.workers
