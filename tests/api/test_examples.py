"""Examples to copy: well-formed whatever a model takes, and only as long as one would copy."""

import json
import shlex
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from modelhost._tensors import DATATYPES
from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import inference_service_pb2 as pb
from modelhostd.api.examples import examples, method_for
from modelhostd.ports import TensorSpec
from modelhostd.worker import oip as worker_oip
from modelhostd.worker.backend import Signature
from modelhostd.worker.backend import TensorSpec as WorkerSpec

TEXT = TensorSpec("text", "BYTES", (-1,))
SPECS = st.builds(
    TensorSpec,
    name=st.text(min_size=1, max_size=20),
    datatype=st.sampled_from(DATATYPES),
    shape=st.lists(st.integers(-1, 4), max_size=3).map(tuple),
)


def request_of(command: str) -> dict[str, object]:
    """Return the JSON that a `buf curl` command sends."""
    words = shlex.split(command.replace("\\\n", " "))
    return json.loads(words[words.index("-d") + 1])  # type: ignore[no-any-return]


@given(st.lists(SPECS, min_size=1, max_size=3, unique_by=lambda one: one.name), SPECS)
def test_examples_for_any_tensors_are_well_formed(
    inputs: list[TensorSpec], output: TensorSpec
) -> None:
    """Programs compile, and what `buf curl` sends is what the worker accepts for these inputs."""
    made = examples("m", "", inputs, [output], "127.0.0.1:7411")
    for tool in ("python", "tritonclient"):
        compile(made[tool], tool, "exec")
    if "buf curl" not in made:
        return
    request = json_format.ParseDict(request_of(made["buf curl"]), oip.ModelInferRequest())
    specs = tuple(WorkerSpec(one.name, one.datatype, one.shape) for one in inputs)
    parsed = worker_oip.parse(
        request.SerializeToString(), name="m", version="1", signature=Signature(specs, specs)
    )
    assert list(parsed.inputs) == [one.name for one in inputs]


@pytest.mark.parametrize("datatype", DATATYPES)
def test_triton_takes_the_arrays_of_its_example(datatype: str) -> None:
    """Of each datatype: what comes before the call runs."""
    tensor = TensorSpec("x", datatype, (-1, 2))
    program = examples("m", "", [tensor], [tensor], "127.0.0.1:7411")["tritonclient"]
    known: dict[str, Any] = {}
    exec(program.partition("result =")[0], known)
    known["client"].close()
    assert known["inputs"][0].datatype() == datatype


@pytest.mark.parametrize(
    ("method", "inputs", "request_type"),
    [
        ("Embed", TEXT, pb.EmbedRequest),
        ("Classify", TEXT, pb.ClassifyRequest),
        ("Generate", TensorSpec("text_input", "BYTES", (1,)), pb.GenerateRequest),
    ],
)
def test_examples_of_a_task_call_its_method(method, inputs, request_type) -> None:
    """The command sends the method's own request, the program calls the client's method."""
    made = examples("m", method, [inputs], [], "127.0.0.1:7411")
    request = json_format.ParseDict(request_of(made["buf curl"]), request_type())
    assert request.model == "models/m"
    assert f"InferenceService/{method}" in made["buf curl"]
    assert f"host.{method.lower()}(" in made["python"]


def test_a_method_is_named_only_where_the_signature_is_its_tasks() -> None:
    """A module of the task with other tensors is asked with these."""
    vector = TensorSpec("embedding", "FP32", (-1, 8))
    assert method_for("Embed", [TEXT], [vector]) == "Embed"
    assert method_for("Embed", [vector], [vector]) == ""
    assert method_for("", [TEXT], [vector]) == ""


def test_a_command_of_very_many_numbers_is_left_out() -> None:
    """An image has 150,528 of them; programs make them themselves."""
    image = TensorSpec("image", "FP32", (-1, 3, 224, 224))
    assert examples("m", "", [image], [], "a:1").keys() == {"python", "tritonclient"}
