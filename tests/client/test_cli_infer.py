"""The command infer: texts and tensors in, values out."""

import json
from pathlib import Path

import numpy as np
import pytest

from modelhost.oip import open_inference_pb2 as oip
from tests.client.double import Double

# --- inference ----------------------------------------------------------------------------------------


def answer_with(name: str, array: np.ndarray):
    response = oip.ModelInferResponse(raw_output_contents=[array.astype("<f4").tobytes()])
    response.outputs.add(name=name, datatype="FP32", shape=array.shape)
    return response


def test_infer_sends_texts(double: Double, run) -> None:
    """Texts of the command line, or lines of standard input, become the input `text`."""
    double.on("ModelInfer", answer_with("embedding", np.array([[0.5, 1.0], [0.25, 2.0]])))
    done = run("infer", "mini", "one", "two")
    assert done.stdout == "embedding\t0\t[0.5, 1.0]\nembedding\t1\t[0.25, 2.0]\n"
    run("infer", "mini", "-", input="one\ntwo\n")
    first, second = double.requests("ModelInfer")
    assert first == second
    assert first.raw_input_contents[0] == b"\x03\x00\x00\x00one\x03\x00\x00\x00two"


def test_infer_sends_tensors_of_the_models_datatype(double: Double, run, tmp_path: Path) -> None:
    """JSON becomes what is said, else what the model wants, else what the numbers look like."""
    double.on(
        "ModelMetadata",
        oip.ModelMetadataResponse(inputs=[{"name": "a", "datatype": "FP16", "shape": [-1]}]),
    )
    double.on("ModelInfer", answer_with("y", np.array([np.nan, np.inf, -np.inf, 1.5])))
    (tmp_path / "c.json").write_text("[[1, 2]]")
    done = run(
        "infer", "m", "-i", "a=[1, 2.5]", "-i", "b=[true]", "-i", f"c:fp32=@{tmp_path}/c.json",
        "-i", 'd=["x"]', "-i", "e=[3]", "-i", "f=[[3, 0.5]]", "-o", "y", "-p", "top=3", "-p", "way=left",
        "--version", "2", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (sent,) = double.requests("ModelInfer")
    assert [(i.name, i.datatype, list(i.shape)) for i in sent.inputs] == [
        *(("a", "FP16", [2]), ("b", "BOOL", [1]), ("c", "FP32", [1, 2])),
        *(("d", "BYTES", [1]), ("e", "INT64", [1]), ("f", "FP32", [1, 2])),
    ]
    assert sent.parameters["top"].int64_param == 3
    assert sent.parameters["way"].string_param == "left"
    assert sent.model_version == "2"
    assert json.loads(done.stdout) == {
        "model_name": "m",
        "outputs": [
            {
                "name": "y",
                "datatype": "FP32",
                "shape": [4],
                "data": ["NaN", "Infinity", "-Infinity", 1.5],
            }
        ],
    }


def test_infer_refuses_files_and_options_that_are_none(double: Double, run, tmp_path: Path) -> None:
    """A file that is not text, an input and a parameter given twice: what is wrong is said, nothing is sent."""
    (tmp_path / "raw").write_bytes(b"\x7fELF\xff")
    for words, says in (
        (["-i", f"x:INT8=@{tmp_path}/raw"], "byte 4 is not UTF-8"),
        (["-i", "x:INT8=1", "-i", "x:INT8=2"], "twice"),
        (["-i", "x:INT8=1", "-p", "a=1", "-p", "a=2"], "twice"),
        (["-i", "x:INT8=1", "-p", "=1"], "not KEY=VALUE"),
        (["-i", f"x={'[' * 100_000}"], "not JSON"),
    ):
        done = run("infer", "m", *words)
        assert done.exit_code == 2
        assert says in done.stderr
    assert double.calls == []


def test_infer_refuses_lists_deeper_than_tensors(double: Double, run) -> None:
    """Hundreds of lists in one another are no array, and said to be none, by whatever reads them."""
    double.on("ModelMetadata", oip.ModelMetadataResponse(name="m"))
    done = run("infer", "m", "-i", f"x={'[' * 600}{']' * 600}")
    assert done.exit_code == 2
    assert "inputs[x]" in done.stderr
    assert double.requests("ModelInfer") == []


def test_infer_shortens_long_rows_for_people(double: Double, run) -> None:
    """A table shows the first numbers of a row and how many there are."""
    double.on("ModelInfer", answer_with("embedding", np.ones((1, 384))))
    done = run("--format", "table", "infer", "m", "x")
    assert done.stdout == "embedding\t0\t[1, 1, 1, 1, 1, 1, ...] (384)\n"


@pytest.mark.parametrize("value", ["[[1], [1, 2]]", '[1, "x"]', "[1.5, 2]"])
def test_infer_refuses_ragged_and_lossy_input(double: Double, run, value) -> None:
    """Rows of different length, and values that the datatype cannot hold, are exit code 2."""
    done = run("infer", "m", "-i", f"x:INT64={value}")
    assert done.exit_code == 2
    assert double.requests("ModelInfer") == []
