"""What the transformers backend refuses: code, broken files, numbers out of bounds, options it does not know."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from modelhostd.worker.backend import (
    BadInputError,
    InferContext,
    LoadContext,
    LoadError,
    Tensor,
    UnsupportedModelError,
)
from modelhostd.worker.backends.transformers import TransformersBackend
from tests.worker.bert import CLASSIFICATION, EMBEDDING, load


def test_weights_of_another_task_are_refused(tiny):
    """An embedding model has no classifier: loading it as one fails instead of answering at random."""
    with pytest.raises(LoadError, match="classifier"):
        load(tiny, CLASSIFICATION)


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"input_ids": [[12]], "attention_mask": [[1]]}, "input_ids"),
        ({"input_ids": [[-1]], "attention_mask": [[1]]}, "input_ids"),
        ({"input_ids": [[1]], "attention_mask": [[2]]}, "attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask"),
        ({"input_ids": [[1] * 25], "attention_mask": [[1] * 25]}, "input_ids"),
        ({"input_ids": [[]], "attention_mask": [[]]}, "input_ids"),
        ({"input_ids": [[1]], "attention_mask": [[1]], "token_type_ids": [[2]]}, "token_type_ids"),
    ],
    ids=["beyond vocabulary", "negative", "mask", "shapes", "too long", "no tokens", "segment"],
)
def test_token_tensors_out_of_bounds_are_refused(tiny, tensors, field):
    """Numbers that the model's tables do not hold are refused by name, and never looked up."""
    inputs = {name: Tensor("INT64", np.array(values, np.int64)) for name, values in tensors.items()}
    with pytest.raises(BadInputError) as caught:
        load(tiny).infer(inputs, InferContext())
    assert caught.value.field == field


def test_texts_that_cannot_be_read_are_refused(tiny):
    """Bytes that are not UTF-8, and endless ones, name the element."""
    backend = load(tiny)
    elements = np.empty(2, object)
    for bad in (b"\xff\xfe", b"x" * (2**20 + 1)):
        elements[:] = [b"fine", bad]
        with pytest.raises(BadInputError) as caught:
            backend.infer({"text": Tensor("BYTES", elements)}, InferContext())
        assert caught.value.field == "text[1]"


@pytest.mark.parametrize(
    "where",
    ["config.json", "tokenizer_config.json", "preprocessor_config.json", "sub/config.json"],
)
def test_a_model_with_code_of_its_own_is_refused(tiny, tmp_path, where):
    """A configuration that names Python files is refused before anything is imported."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass M: pass\n")
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    config = json.loads(path.read_text()) if path.exists() else {}
    config["nested"] = [{"auto_map": {"AutoModel": "evil.M", "AutoTokenizer": ["evil.M", None]}}]
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        load(tmp_path)
    assert not canary.exists()


def broken(kind, folder):
    """Break a model's files."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "cut":
        weights.write_bytes(data[:-100])
    elif kind == "cut header":
        weights.write_bytes(data[:40])
    elif kind == "huge header":
        weights.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "missing":
        tensors = load_file(weights)
        tensors.pop(next(name for name in sorted(tensors) if "layer.1" in name))
        save_file(tensors, weights)
    elif kind == "other shape":
        tensors = load_file(weights)
        name = next(name for name in sorted(tensors) if "query.weight" in name)
        tensors[name] = tensors[name][:4].clone()
        save_file(tensors, weights)
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "shard outside":
        weights.unlink()
        index = {"weight_map": {"x": "../outside.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "kind",
    ["pickle", "cut", "cut header", "huge header", "empty", "missing", "other shape", "config",
     "no config", "shard outside"],
)  # fmt: skip
def test_broken_files_are_refused(tiny, tmp_path, kind):
    """Whatever is wrong with a model's files, the load raises what becomes LOAD_FAILED, and nothing is held."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    broken(kind, tmp_path)
    backend = TransformersBackend()
    with pytest.raises((LoadError, OSError, ValueError)):
        backend.load(LoadContext("m", tmp_path, EMBEDDING, "cpu"))
    backend.unload()
    assert backend.measured_bytes == 0


def test_unknown_options_and_precisions_are_refused(tiny):
    """A typo in the options names what is known."""
    for more in (
        {"options": {"poling": "cls"}},
        {"options": {"pooling": "best"}},
        {"precision": "fp7"},
    ):
        with pytest.raises(BadInputError):
            load(tiny, **more)


def test_compile_is_true_or_false(tiny):
    """Another value is refused before anything is read."""
    with pytest.raises(BadInputError) as caught:
        load(tiny, options={"compile": "yes"})
    assert caught.value.field == "compile"
