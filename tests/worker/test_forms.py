"""Requests that are recognised are read as if they had been looked at whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhost.oip import open_inference_pb2 as pb
from modelhostd.core.errors import ModelhostError
from modelhostd.worker import forms, oip
from modelhostd.worker.backend import Signature
from modelhostd.worker.forms import Forms

BATCHED = Signature(batched=True, max_batch_size=4)


def request(seed=0, *, id="7", datatypes=("FP32", "INT64"), width=3, parameter=5):
    """Return an encoded request with a tensor of each datatype; ``seed`` is what is in them."""
    made = pb.ModelInferRequest(model_name="m", id=id)
    made.parameters["mine"].int64_param = parameter
    made.outputs.add(name="x0")
    for index, datatype in enumerate(datatypes):
        made.inputs.add(name=f"x{index}", datatype=datatype, shape=(2, width))
        size = 2 * width * (8 if datatype == "INT64" else 4)
        made.raw_input_contents.append(bytes((seed + i) % 256 for i in range(size)))
    return made.SerializeToString()


def outcome(parse, payload):
    """Return all that comes of parsing, for comparison."""
    try:
        parsed = parse(payload, name="m", version=3, signature=BATCHED)
    except ModelhostError as error:
        return error.reason, error.message, error.metadata
    inputs = [(n, t.datatype, t.array.shape, t.array.tobytes()) for n, t in parsed.inputs.items()]
    answer = {"x0": parsed.inputs["x0"], "y": np.zeros((2, 1), np.float32)}
    encoded = pb.ModelInferResponse.FromString(oip.Response(parsed, 3, answer).to_bytes())
    return (
        *(parsed.id, parsed.model_name, inputs, parsed.outputs, parsed.parameters),
        *(parsed.item_count, parsed.tops, encoded),
    )


def looks(monkeypatch):
    """Return a list that grows whenever a request is looked at whole."""
    seen = []

    def parse(payload, **rest):
        seen.append(bytes(payload))
        return whole(payload, **rest)

    whole = oip.parse
    monkeypatch.setattr(oip, "parse", parse)
    return seen


@given(st.data(), st.integers(1, 4), st.booleans())
def test_whatever_differs_is_seen(data, changes, in_arena):
    """Of a remembered request with any of its bytes changed comes what comes of it unremembered."""
    known = Forms()
    first = request()
    assert outcome(known.parse, first) == outcome(oip.parse, first)
    changed = bytearray(first)
    for _ in range(changes):
        changed[data.draw(st.integers(0, len(first) - 1))] = data.draw(st.integers(0, 255))
    payload = memoryview(bytes(changed)) if in_arena else bytes(changed)
    for _ in range(2):
        assert outcome(known.parse, payload) == outcome(oip.parse, payload)


def test_other_numbers_and_ids_are_recognised(monkeypatch):
    """A request that differs in its id and its tensors alone is not looked at again; each other one is."""
    known = Forms()
    expected = [outcome(oip.parse, one) for one in (request(0), request(9, id="8"))]
    seen = looks(monkeypatch)
    assert outcome(known.parse, request(0)) == expected[0]
    assert outcome(known.parse, request(9, id="8")) == expected[1]
    assert len(seen) == 1
    for other in (request(width=4), request(parameter=6), request(datatypes=("FP32",))):
        before = len(seen)
        outcome(known.parse, other)
        assert len(seen) == before + 1


def test_what_one_request_does_to_its_parameters_no_other_sees():
    """Parameters are each request's own."""
    known = Forms()
    for _ in range(3):
        parsed = known.parse(request(), name="m", version=3, signature=BATCHED)
        assert parsed.parameters.pop("mine") == 5


def test_memory_is_bounded():
    """However many lengths come, a bounded number is remembered, and none that is long beside its tensors."""
    known = Forms()
    for number in range(forms.FORMS_MAX + 5):
        known.parse(request(id="i" * number), name="m", version=3, signature=BATCHED)
    assert 0 < len(known._by_length) <= forms.FORMS_MAX
    long = request(datatypes=("FP32",) * 60, width=1)
    before = len(known._by_length)
    for _ in range(2):
        known.parse(long, name="m", version=3, signature=BATCHED)
    assert len(known._by_length) in (before, before + 1)
    assert all(
        sum(len(same) for _, _, same in form.same) <= forms.SAME_BYTES_MAX
        for form in known._by_length.values()
    )


def test_texts_are_looked_at_each_time(monkeypatch):
    """BYTES and BOOL say by their bytes what they are, and are not remembered."""
    known = Forms()
    made = pb.ModelInferRequest(model_name="m")
    made.inputs.add(name="flag", datatype="BOOL", shape=(2,))
    made.raw_input_contents.append(b"\1\2")
    seen = looks(monkeypatch)
    for _ in range(2):
        parsed = known.parse(made.SerializeToString(), name="m", version=3, signature=BATCHED)
        assert parsed.inputs["flag"].array.tolist() == [True, True]
    assert len(seen) == 2


def test_another_name_is_looked_at():
    """A request that a client sent under another name of the model is not taken for one under this name."""
    known = Forms()
    known.parse(request(), name="m", version=3, signature=BATCHED)
    with pytest.raises(ModelhostError):
        known.parse(request(), name="n", version=3, signature=BATCHED)
