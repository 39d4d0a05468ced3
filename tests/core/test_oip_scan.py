"""The scan of a request's head against protobuf's own parser, and against bytes made to hurt."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.oip_scan import FIELDS_MAX, RequestHead, scan

MIB = 1 << 20


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def reason_of(payload: bytes) -> Reason:
    with pytest.raises(ModelhostError) as caught:
        scan(payload)
    return caught.value.reason


texts = st.sampled_from(["", "a", "minilm", "b" * 200, "ä", "x\0y"])
contents = st.one_of(st.binary(max_size=8), texts.map(str.encode))
values = st.one_of(
    st.integers(0, 2**64 - 1).map(lambda v: varint(2 << 3) + varint(v)),
    st.integers(0, 2**64 - 1).map(lambda v: varint(5 << 3) + varint(v)),
    st.integers(0, 3).map(lambda v: varint(1 << 3) + varint(v)),
    st.just(varint(4 << 3 | 1) + b"\0" * 8),
    contents.map(lambda c: field(3, c)),
    st.binary(max_size=6),
)
names = st.sampled_from([b"timeout", b"priority", b"triton_enable_empty_final_response", b"other"])
entries = st.lists(
    st.one_of(
        names.map(lambda n: field(1, n)),
        st.lists(values, max_size=3).map(lambda vs: field(2, b"".join(vs))),
        st.binary(max_size=4),
    ),
    max_size=4,
).map(b"".join)
pieces = st.one_of(
    st.builds(field, st.sampled_from([1, 1, 2, 3, 9]), contents),
    st.builds(lambda c: field(4, c), entries),
    st.builds(lambda n, v: varint(n << 3) + varint(v), st.integers(1, 9), st.integers(0, 2**70)),
    st.builds(lambda n: varint(n << 3 | 5) + b"\1\2\3\4", st.integers(1, 9)),
    st.builds(lambda n: varint(n << 3 | 1) + b"\1" * 8, st.integers(0, 9)),
    st.builds(lambda c: field(7, c), st.binary(max_size=300)),
    st.binary(max_size=3),
)


def parameter(request: oip.ModelInferRequest, name: str) -> int:
    value = request.parameters[name] if name in request.parameters else oip.InferParameter()
    choice = value.WhichOneof("parameter_choice")
    if name not in request.parameters:
        return 0
    assert choice in ("int64_param", "uint64_param")
    return int(getattr(value, choice))


@given(st.lists(pieces, max_size=8).map(b"".join))
@settings(max_examples=500)
@example(b'"\x10\n\x07timeout\x98\x00\x00\x12\x02\x10\x01')
def test_what_is_read_is_what_protobuf_reads(payload: bytes) -> None:
    """Whenever the scan and protobuf both take a message, they agree on every field of its head."""
    try:
        head = scan(payload)
        request = oip.ModelInferRequest.FromString(payload)
    except (ModelhostError, DecodeError):
        return
    assert head.model_name == request.model_name
    assert head.model_version == request.model_version
    assert head.id == request.id
    assert head.timeout_us == parameter(request, "timeout")
    assert head.priority == parameter(request, "priority")
    empty_final = request.parameters.get("triton_enable_empty_final_response")
    assert head.empty_final == (empty_final is not None and empty_final.bool_param)


@given(
    texts,
    texts,
    texts,
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=64),
)
def test_a_plain_message_is_read_whole(
    name: str, version: str, request_id: str, timeout: int, priority: int, raw: bytes
) -> None:
    """A message as clients send it is never refused, and each field comes back."""
    request = oip.ModelInferRequest(model_name=name, model_version=version, id=request_id)
    request.parameters["timeout"].int64_param = timeout
    request.parameters["priority"].uint64_param = priority
    request.parameters["mine"].string_param = "anything"
    request.inputs.add(name="INPUT0", datatype="UINT8", shape=[len(raw)])
    request.raw_input_contents.append(raw)
    head = scan(request.SerializeToString())
    assert head == RequestHead(name, version, request_id, timeout, priority)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_head_or_in_a_typed_error(payload: bytes) -> None:
    """Random bytes raise INVALID_ARGUMENT or are read; nothing else comes out."""
    refused: ModelhostError | None = None
    try:
        scan(payload)
    except ModelhostError as error:
        refused = error
    assert refused is None or refused.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\x3a\0" * 2_000_000, id="two-million-empty-fields"),
        pytest.param(field(4, b"\x0a\0" * 2_000_000), id="two-million-fields-in-a-parameter"),
        pytest.param(b"\x22\x04\x12\x02\x08\1" * 5000, id="many-parameters"),
        pytest.param(b"\x0a\x05abc", id="cut-text"),
        pytest.param(b"\x0a", id="cut-length"),
        pytest.param(b"\xff" * 64, id="endless-number"),
        pytest.param(b"\x0a\xff\xff\xff\xff\xff\x01", id="length-above-2-gib"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x07a", id="length-beyond-the-end"),
        pytest.param(b"\x02\x00", id="field-number-0"),
        pytest.param(b"\x0b\x0c" * 100, id="groups"),
        pytest.param(b"\x0e", id="wire-type-6"),
        pytest.param(b"\x0a\x02\xc3\x28", id="not-utf-8"),
        pytest.param(b"\x29\x01", id="cut-fixed64"),
        pytest.param(field(1, b"a" * (8 * MIB)), id="eight-mib-name"),
        pytest.param(field(3, b"a" * 1025), id="long-id"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http"),
    ],
)
def test_hostile_bytes_are_refused(payload: bytes) -> None:
    """Bytes made to hurt get INVALID_ARGUMENT."""
    assert reason_of(payload) is Reason.INVALID_ARGUMENT


class Counting:
    """Bytes that count how often they are looked at."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.looks = 0

    def __len__(self) -> int:
        return len(self.payload)

    def __getitem__(self, place: Any) -> Any:
        self.looks += 1
        return self.payload[place]


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(b"\x3a\0", id="empty-fields"),
        pytest.param(b"\xba\x80\x80\x80\0\x80\x80\x80\x80\0", id="long-numbers"),
        pytest.param(b"\x22\0", id="empty-parameters"),
        pytest.param(b"\x22\x0b\x0a\x07timeout\x12\0", id="parameters"),
        pytest.param(b"\x0a\x01a", id="names"),
        pytest.param(b"\x40\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", id="numbers"),
    ],
)
def test_the_work_is_bounded_whatever_the_size(piece: bytes) -> None:
    """A message that is a hundred times as long costs not one look more: the scan stops."""
    looks = []
    for times in (2 * FIELDS_MAX, 200 * FIELDS_MAX):
        payload = Counting(piece * times)
        with pytest.raises(ModelhostError):
            scan(payload)  # type: ignore[arg-type]
        looks.append(payload.looks)
    assert looks[0] == looks[1] <= 12 * FIELDS_MAX


def test_one_field_is_never_worked_through() -> None:
    """However long the fields of one message are, only what is routed by is looked at."""
    whole = field(1, b"a") + field(7, bytes(8 * MIB)) + field(5, b"\x0a\0" * MIB)
    payload = Counting(whole + field(4, field(1, b"x" * MIB)))
    assert scan(payload).model_name == "a"  # type: ignore[arg-type]
    assert payload.looks < 64


def test_the_last_of_two_names_counts() -> None:
    """Of two fields 1 the last is the name, wherever it stands, as the worker's parser has it."""
    payload = field(1, b"cheap") + field(7, b"\0" * 100) + field(1, b"dear")
    assert scan(payload).model_name == "dear"
    assert oip.ModelInferRequest.FromString(payload).model_name == "dear"


def test_as_many_fields_as_allowed_are_read() -> None:
    """The bound itself is still fine, one more is not."""
    assert scan(field(1, b"a") + b"\x3a\0" * (FIELDS_MAX - 1)).model_name == "a"
    assert reason_of(field(1, b"a") + b"\x3a\0" * FIELDS_MAX) is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["timeout", "priority"])
@pytest.mark.parametrize(
    "choice", ["string_param", "double_param", "bool_param", "none", "negative"]
)
def test_limits_must_be_whole_numbers(name: str, choice: str) -> None:
    """A timeout or priority of another type, or below 0, is refused by its path."""
    request = oip.ModelInferRequest(model_name="a")
    value = request.parameters[name]
    match choice:
        case "string_param":
            value.string_param = "5"
        case "double_param":
            value.double_param = 5.0
        case "bool_param":
            value.bool_param = True
        case "negative":
            value.int64_param = -1
    with pytest.raises(ModelhostError) as caught:
        scan(request.SerializeToString())
    assert caught.value.metadata["field"] == f"parameters[{name}]"
