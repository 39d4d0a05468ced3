"""Any ModelInferRequest, read twice: by daemon and worker, and by an oracle that shares no code with them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.oip_scan import scan
from modelhostd.worker.backend import BadInputError, Signature, TensorSpec
from modelhostd.worker.oip import Response, parse
from tests.hostile.messages import payloads
from tests.hostile.oracle import HOMES, MODEL, WIDTHS, Takes, faults
from tests.hostile.profile import examples

EXAMPLES = 1500

MODELS = {
    "identity": Takes(),
    "batched": Takes(batched=True, items_max=4),
    "numbers": Takes({"x": ("FP32", (-1, 3)), "n": ("INT8", (-1, 1))}, ("y",), True, 2),
    "texts": Takes(
        {"text": ("BYTES", (-1,))}, ("score", "label"), parameters=frozenset({"theirs"})
    ),
    "scalar": Takes({"flag": ("BOOL", ()), "half": ("BF16", (2, -1))}, ("out",)),
}
SIGNATURES = {
    name: Signature(
        inputs=tuple(TensorSpec(n, t, tuple(s)) for n, (t, s) in takes.inputs.items()),
        outputs=tuple(TensorSpec(n, "FP32", (-1,)) for n in takes.outputs),
        batched=takes.batched,
        max_batch_size=takes.items_max,
        parameters=takes.parameters,
    )
    for name, takes in MODELS.items()
}

names = st.sampled_from(["x", "n", "text", "flag", "half", "y", "", "q" * 300, "\n"])
datatypes = st.sampled_from([*WIDTHS, "BYTES", "FP8", ""])
sizes = st.sampled_from([0, 1, 2, 3, 5, -1, 2**31, 2**47, 2**62, -(2**63), 1_000_001])
parameters = st.sampled_from(
    [
        "timeout",
        "priority",
        "mine",
        "theirs",
        "triton_x",
        "triton_enable_empty_final_response",
        "triton_" * 40,
    ]
)
values = st.sampled_from(
    [("int64_param", -1), ("int64_param", 5), ("string_param", "x"), ("bool_param", True),
     ("uint64_param", 2**63), ("double_param", 1.0)]
)  # fmt: skip

OF_REQUESTS = ("model", "version", "id", "items", "raw", "output", "top", "region", "parameter")
OF_TENSORS = (
    "gone",
    "twice",
    "name",
    "datatype",
    "shape",
    "memory",
    "count",
    "form",
    "home",
    "value",
)
wrongs = st.lists(st.sampled_from(OF_REQUESTS + OF_TENSORS), max_size=2).map(frozenset)


@st.composite
def requests(draw: st.DrawFn, name: str) -> oip.ModelInferRequest:
    """Make a request that a model takes, but for what is drawn to be other than usual."""
    takes, odd = MODELS[name], draw(wrongs)
    made = oip.ModelInferRequest(model_name="nobody" if "model" in odd else name, id="7")
    if "version" in odd:
        made.model_version = draw(st.sampled_from(["1", "7", "x"]))
    if "id" in odd:
        made.id = "i" * draw(st.sampled_from([1024, 1025]))
    wanted = dict(takes.inputs) or {"x": ("FP32", (-1, 2)), "text": ("BYTES", (-1,))}
    items = draw(st.integers(0, 5)) if "items" in odd else 2
    typed = draw(st.booleans()) and "half" not in wanted
    victim = draw(st.sampled_from(sorted(wanted)))
    for tensor, (datatype, shape) in wanted.items():
        wrong = odd if tensor == victim else frozenset()
        for _ in range(2 if "twice" in wrong else 0 if "gone" in wrong else 1):
            sized = [items if size < 0 else size for size in shape]
            draw(tensors(made, tensor, datatype, sized, typed, wrong))
    if "raw" in odd:
        made.raw_input_contents.append(bytes(draw(st.integers(0, 9))))
    if odd & {"output", "top", "region"}:
        asked = made.outputs.add(name=draw(st.sampled_from([*(takes.outputs or wanted)])))
        if "output" in odd:
            asked.name = draw(names)
            made.outputs.add(name=draw(names))
        if "top" in odd:
            asked.parameters["classification"].int64_param = draw(st.integers(-1, 3))
        if "region" in odd:
            asked.parameters["shared_memory_region"].string_param = "r"
    if "parameter" in odd:
        kind, value = draw(values)
        setattr(made.parameters[draw(parameters)], kind, value)
    return made


@st.composite
def tensors(
    draw: st.DrawFn,
    made: oip.ModelInferRequest,
    name: str,
    datatype: str,
    shape: list[int],
    typed: bool,
    odd: frozenset[str],
) -> None:
    """Add a tensor to a request."""
    name = draw(names) if "name" in odd else name
    datatype = draw(datatypes) if "datatype" in odd else datatype
    count = math.prod(shape) + (draw(st.sampled_from([1, 3])) if "count" in odd else 0)
    shape = draw(st.lists(sizes, max_size=10)) if "shape" in odd else shape
    tensor = made.inputs.add(name=name, datatype=datatype, shape=shape)
    if "memory" in odd:
        tensor.parameters["shared_memory_region"].string_param = "r"
    if typed is not ("form" in odd):
        tensor.contents.SetInParent()
        home = HOMES.get(datatype, "int_contents")
        home = draw(st.sampled_from(sorted(set(HOMES.values())))) if "home" in odd else home
        element = draw(st.sampled_from([-129, 128, 256, 65_536])) if "value" in odd else 1
        element = abs(element) if home.startswith("u") else element
        getattr(tensor.contents, home).extend(
            [b"x" if home == "bytes_contents" else bool(element) if home[:2] == "bo" else element]
            * count
        )
    elif datatype == "BYTES":
        length = draw(st.sampled_from([2, 2**32 - 1])) if "value" in odd else 1
        made.raw_input_contents.append((length.to_bytes(4, "little") + b"x") * count)
    else:
        made.raw_input_contents.append(b"\1" * (count * WIDTHS.get(datatype, 4)))


def verdict(message: bytes) -> str:
    """Return the field that daemon and worker refuse a message for; empty = they take it."""
    try:
        head = scan(message)
        if head.model_name not in MODELS:
            return MODEL
        signature = SIGNATURES[head.model_name]
        parsed = parse(message, name=head.model_name, version=1, signature=signature)
        if not signature.inputs:  # outputs are the inputs
            Response(parsed, 1, parsed.inputs)
    except ModelhostError as error:
        return field_of(error)
    except BadInputError as error:
        return error.field
    return ""


def field_of(error: ModelhostError) -> str:
    """Return the field that a refusal names, with what is expected there."""
    if error.reason is Reason.MODEL_NOT_FOUND:
        return MODEL
    assert error.reason is Reason.INVALID_ARGUMENT, error
    assert error.metadata["expected"]
    return error.metadata["field"]


@pytest.mark.parametrize("name", MODELS)
def test_server_and_oracle_agree_on_what_is_taken(name: str) -> None:
    """A request is taken where the oracle finds no fault, else refused for a field that the oracle names."""
    seen = {True: 0, False: 0}
    anything = payloads(oip.ModelInferRequest.DESCRIPTOR, [oip.ModelInferRequest(model_name=name)])
    near = requests(name).map(oip.ModelInferRequest.SerializeToString)

    @settings(max_examples=examples(EXAMPLES // len(MODELS)))
    @given(st.one_of(near, near, near, anything))
    def attempt(message: bytes) -> None:
        wrong, got = faults(message, MODELS), verdict(message)
        assert got in wrong if got else not wrong, f"{got!r}, not {set(wrong)}"
        seen[not got] += 1

    attempt()
    assert all(seen.values()), seen
