"""Plain modules: exported programs, and weights for classes that the operator installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modelhostd.worker import registry
from modelhostd.worker.backend import (
    BadInputError,
    InferContext,
    LoadContext,
    LoadError,
    Tensor,
    UnsupportedModelError,
)
from modelhostd.worker.backends.modules.exported import TorchExportBackend
from modelhostd.worker.backends.modules.installed import InstalledModuleBackend
from modelhostd.worker.batches import split


class Scorer(torch.nn.Module):
    """A linear layer with an offset and an optional factor."""

    inputs = (("x", "FP32", (-1, 4)),)
    outputs = (("y", "FP32", (-1, 3)), ("best", "INT64", (-1,)))

    def __init__(self, outputs=3):
        super().__init__()
        self.layer = torch.nn.Linear(4, outputs)
        self.register_buffer("offset", torch.ones(outputs))

    def forward(self, x):
        """Return scores and the best of them."""
        scores = self.layer(x) + self.offset
        return {"y": scores, "best": scores.argmax(-1)}


class Wordless(torch.nn.Module):
    """A class that does not say what it takes."""


ROWS = np.arange(20, dtype=np.float32).reshape(5, 4)


@pytest.fixture
def scorer():
    torch.manual_seed(5)
    return Scorer().eval()


@pytest.fixture
def exported(scorer, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(scorer, (torch.zeros(2, 4),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path


@pytest.fixture
def installed(scorer, tmp_path, monkeypatch):
    """Give a folder with weights, and a distribution that offers the classes above."""
    site = tmp_path / "site"
    info = site / "scorers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scorers\nVersion: 1.0\n")
    module = __name__
    monkeypatch.setitem(sys.modules, module, sys.modules[module])
    names = {"scorer": "Scorer", "wordless": "Wordless", "broken": "NotThere"}
    lines = "".join(f"{name} = {module}:{kind}\n" for name, kind in names.items())
    (info / "entry_points.txt").write_text(f"[modelhost.modules]\n{lines}")
    monkeypatch.syspath_prepend(str(site))
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(scorer.state_dict(), folder / "model.safetensors")
    return folder


def load(kind, folder, **more):
    """Load a backend in this process and check it."""
    backend = kind()
    backend.load(LoadContext("m", Path(folder), "other", "cpu", **more))
    assert backend.health_check().ok
    assert backend.health_check().ok
    return backend


def ask(backend, array=ROWS, **context):
    """Send rows."""
    return backend.infer({"x": Tensor("FP32", array)}, InferContext(**context))


def check(backend, scorer):
    """Compare answers, signature and memory with the module itself."""
    with torch.inference_mode():
        want = scorer(torch.from_numpy(ROWS))
    got = ask(backend)
    assert np.allclose(got["y"].array, want["y"].numpy())
    assert got["best"].array.tolist() == want["best"].tolist()
    assert (got["y"].datatype, got["best"].datatype) == ("FP32", "INT64")
    assert ask(backend, outputs=frozenset({"best"})).keys() == {"best"}
    signature = backend.signature()
    assert [(s.name, s.datatype, s.shape) for s in signature.inputs] == list(Scorer.inputs)
    assert [(s.name, s.datatype, s.shape) for s in signature.outputs] == list(Scorer.outputs)
    # What is read lies aligned.
    assert (4 * 3 + 3 + 3) * 4 <= backend.measured_bytes <= 4096
    assert isinstance(backend.torch_module(), torch.nn.Module)


def test_an_exported_program_answers_by_its_own_names(exported, scorer):
    """Inputs, outputs and their shapes come from the file."""
    check(load(TorchExportBackend, exported), scorer)


def test_an_installed_class_answers_with_the_weights_of_the_files(installed, scorer):
    """The class is the operator's, the weights are the model's."""
    check(load(InstalledModuleBackend, installed, options={"class": "scorer"}), scorer)


def test_weights_that_are_swapped_are_used(exported, installed):
    """Both give a module whose parameters may be moved: the answers follow them."""
    backends = (
        load(TorchExportBackend, exported),
        load(InstalledModuleBackend, installed, options={"class": "scorer"}),
    )
    for backend in backends:
        for tensor in (*backend.torch_module().parameters(), *backend.torch_module().buffers()):
            tensor.data = torch.zeros_like(tensor)
        assert not ask(backend)["y"].array.any()


def test_requests_are_joined_where_a_batch_size_is_set(exported):
    """Several requests in one pass are answered as each alone."""
    backend = load(TorchExportBackend, exported, max_batch_size=16)
    assert backend.signature().joinable
    requests = [{"x": Tensor("FP32", ROWS[a:b])} for a, b in ((0, 1), (1, 3), (3, 5))]
    parts = split(backend.infer(backend.join(requests), InferContext()), [1, 2, 2])
    whole = ask(backend)["y"].array
    assert np.allclose(np.concatenate([part["y"].array for part in parts]), whole)
    assert not load(TorchExportBackend, exported).signature().batched


def test_sizes_that_a_program_was_not_exported_for_are_refused(exported):
    """Input, place, range and size are named."""
    backend = load(TorchExportBackend, exported)
    with pytest.raises(BadInputError) as caught:
        ask(backend, np.zeros((65, 4), np.float32))
    assert caught.value.field == "inputs[x].shape"
    assert caught.value.actual == 65
    with pytest.raises(BadInputError):
        ask(backend, np.zeros((0, 4), np.float32))


def test_dimensions_that_are_one_are_held_to_it(tmp_path):
    """Two inputs of one symbolic size must have the same; tuples get numbered outputs."""

    class Pair(torch.nn.Module):
        def forward(self, a, b):
            return a + b, a * b

    rows = torch.export.Dim("rows", min=3, max=9)
    shapes = {"a": {0: rows}, "b": {0: rows}}
    program = torch.export.export(Pair(), (torch.zeros(4), torch.zeros(4)), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "pair.pt2")
    backend = load(TorchExportBackend, tmp_path)
    assert [spec.name for spec in backend.signature().outputs] == ["output_0", "output_1"]
    given = {name: Tensor("FP32", np.full(n, 3, np.float32)) for name, n in (("a", 5), ("b", 5))}
    assert backend.infer(given, InferContext())["output_1"].array.tolist() == [9] * 5
    given["b"] = Tensor("FP32", np.zeros(6, np.float32))
    with pytest.raises(BadInputError):
        backend.infer(given, InferContext())


@pytest.mark.parametrize("size", [torch.export.Dim("rows"), torch.export.Dim.AUTO])
def test_a_dimension_without_bounds_takes_any_size(scorer, tmp_path, size):
    """A program that was exported with no least and no most size of its batch is loaded, checked and answers."""
    program = torch.export.export(scorer, (torch.zeros(2, 4),), dynamic_shapes={"x": {0: size}})
    torch.export.save(program, tmp_path / "model.pt2")
    backend = load(TorchExportBackend, tmp_path)
    check(backend, scorer)
    assert ask(backend, np.ones((500, 4), np.float32))["y"].array.shape[0] == 500


def test_half_precision_passes_through(tmp_path):
    """BF16 goes as its bits."""

    class Twice(torch.nn.Module):
        def forward(self, x):
            return {"y": x * 2}

    program = torch.export.export(Twice(), (torch.ones(2, dtype=torch.bfloat16),))
    torch.export.save(program, tmp_path / "twice.pt2")
    backend = load(TorchExportBackend, tmp_path)
    one = np.full(2, 0x3F80, np.uint16)
    got = backend.infer({"x": Tensor("BF16", one)}, InferContext())["y"]
    assert (got.datatype, got.array.tolist()) == ("BF16", [0x4000] * 2)


def test_files_that_are_no_program_are_refused(tmp_path):
    """None, several, and garbage are LoadErrors that say so; so are options and a precision."""
    with pytest.raises(LoadError, match=r"0 \.pt2 files"):
        load(TorchExportBackend, tmp_path)
    (tmp_path / "a.pt2").write_bytes(b"garbage")
    with pytest.raises(LoadError, match="cannot be read"):
        load(TorchExportBackend, tmp_path)
    for more in ({"options": {"x": 1}}, {"precision": "fp16"}):
        with pytest.raises(BadInputError):
            load(TorchExportBackend, tmp_path, **more)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, BadInputError),
        ({"class": "os:system"}, BadInputError),
        ({"class": "scorers"}, BadInputError),
        ({"class": "scorer", "more": 1}, BadInputError),
        ({"class": 5}, BadInputError),
        ({"class": "broken"}, LoadError),
        ({"class": "wordless"}, UnsupportedModelError),
    ],
)
def test_only_installed_classes_are_used(installed, options, error):
    """A model names an entry point and nothing else; what is wrong with it is said."""
    with pytest.raises(error):
        load(InstalledModuleBackend, installed, options=options)


def test_weights_and_arguments_must_fit_the_class(installed):
    """Another shape, an unknown argument, missing and foreign tensors are named."""
    options = {"class": "scorer"}
    arguments = installed / "module.json"
    arguments.write_text(json.dumps({"outputs": 5}))
    with pytest.raises(LoadError, match="do not fit"):
        load(InstalledModuleBackend, installed, options=options)
    arguments.write_text(json.dumps({"colour": 5}))
    with pytest.raises(LoadError, match=r"module\.json"):
        load(InstalledModuleBackend, installed, options=options)
    arguments.unlink()
    save_file(
        {"layer.weight": torch.zeros(3, 4), "x": torch.zeros(1)}, installed / "model.safetensors"
    )
    with pytest.raises(LoadError, match=r"layer\.bias"):
        load(InstalledModuleBackend, installed, options=options)


def test_precision_of_an_installed_class(installed):
    """Weights are loaded in the precision that is asked for."""
    backend = InstalledModuleBackend()
    context = LoadContext(
        "m", installed, "other", "cpu", precision="bf16", options={"class": "scorer"}
    )
    backend.load(context)
    assert {p.dtype for p in backend.torch_module().parameters()} == {torch.bfloat16}


def test_they_serve_only_where_the_operator_names_them():
    """Neither is among the defaults; named, both are found."""
    from modelhostd.adapters.workers import WorkersConfig

    names = {name for name, _ in WorkersConfig().allowed_backends()}
    assert not names & {"torch-export", "torch-module"}
    found = registry.find([("torch-export", ""), ("torch-module", "")])
    assert found.backends.keys() == {"torch-export", "torch-module"}
