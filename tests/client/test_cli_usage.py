"""show: what a model takes and gives."""

import json

from modelhost.v1 import inference_service_pb2 as pb
from modelhost.v1 import residency_service_pb2
from tests.client.double import Double

USAGE = pb.ModelDescription(
    model="models/mini",
    inputs=[{"name": "text", "datatype": "BYTES", "shape": [-1], "description": "UTF-8 texts"}],
    outputs=[{"name": "embedding", "datatype": "FP32", "shape": [-1, 384]}],
    examples=[{"tool": "python", "text": "if a:\n    b()\n"}],
)


def test_a_loaded_model_is_shown_with_its_tensors_and_examples(told: Double, run) -> None:
    """Tensors in a table, examples as they are; for scripts a line for each tensor and examples if asked, as JSON all of it."""
    told.on("DescribeModel", USAGE)
    text = run("show", "mini", "--format", "table").stdout
    assert "UTF-8 texts" in text
    assert "[-1, 384]" in text
    assert text.endswith("\npython:\n\nif a:\n    b()\n")
    assert run("show", "mini").stdout.endswith(
        "input\ttext\tBYTES\t[-1]\tUTF-8 texts\noutput\tembedding\tFP32\t[-1, 384]\t\n"
    )
    assert run("show", "mini", "--usage").stdout.endswith(
        "[-1, 384]\t\n\npython:\n\nif a:\n    b()\n"
    )
    shown = json.loads(run("show", "mini", "--json").stdout)
    assert shown["usage"]["examples"] == [{"tool": "python", "text": "if a:\n    b()\n"}]


def test_a_model_that_is_not_loaded_is_loaded_only_for_usage(told: Double, run) -> None:
    """show by itself changes nothing; --usage asks, and fails as the daemon does."""
    told.on("ListInstances", residency_service_pb2.ListInstancesResponse())
    told.on("DescribeModel", pb.ModelDescription(model="models/mini"))
    assert run("show", "mini").exit_code == 0
    assert told.requests("DescribeModel") == []
    assert "any tensors" in run("show", "mini", "--usage").stdout
    assert told.requests("DescribeModel") == [pb.DescribeModelRequest(model="models/mini")]


def test_a_daemon_that_cannot_say_it_is_shown_without(told: Double, run) -> None:
    """An older daemon has no such method: show works, --usage says so."""
    assert run("show", "mini").exit_code == 0
    assert told.requests("DescribeModel")
    assert run("show", "mini", "--usage").exit_code == 1
