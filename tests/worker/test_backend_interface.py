"""Backends of one's own: found by entry point or target, allowed by configuration, held to the interface."""

import dataclasses

import numpy as np
import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ModelConfig
from modelhostd.ports import LoadSpec
from modelhostd.worker import registry
from modelhostd.worker.backend import Backend
from tests.worker.harness import CONFIG, ROOT, decode, encode, ignore, running, spec


def distribution(folder, name, target):
    """Lay out an installed distribution that offers a backend, as pip would."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[modelhost.backends]\n{name} = {target}\n")


async def test_an_installed_backend_serves_when_it_is_allowed(tmp_path):
    """A distribution's entry point is found by its name, loads a model, and answers."""
    distribution(tmp_path, "scaling", "tests.worker.example_backend:ExampleBackend")
    (tmp_path / "scale.json").write_text('{"factor": 3}')
    config = dataclasses.replace(
        CONFIG, backends=("scaling",), import_paths=(str(tmp_path), str(ROOT))
    )
    async with running(config) as (workers, _):
        load = LoadSpec("m", "m-1", 1, 1, tmp_path, "example-scaling", ModelConfig(), 0)
        loaded = await workers.load("cpu", load, ignore)
        assert (loaded.backend, loaded.platform, loaded.max_batch_size) == ("scaling", "example", 8)
        assert [(spec.name, spec.datatype, spec.shape) for spec in loaded.inputs] == [
            ("x", "FP32", (-1, 4))
        ]
        payload = encode({"x": np.ones((2, 4), np.float32)})
        reply = await workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
        assert (decode(reply.payload)[1]["y"] == 3).all()


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"x": np.ones((2, 4), np.float64)}, "inputs[x].datatype"),
        ({"x": np.ones((2, 5), np.float32)}, "inputs[x].shape"),
        ({"x": np.ones(4, np.float32)}, "inputs[x].shape"),
        ({"z": np.ones((1, 4), np.float32)}, "inputs"),
        ({}, "inputs"),
        ({"x": np.ones((0, 4), np.float32)}, "inputs"),
        ({"x": np.ones((9, 4), np.float32)}, "inputs"),
        ({"x": np.full((1, 4), np.nan, np.float32)}, "x"),
    ],
    ids=["datatype", "size", "rank", "name", "missing", "empty batch", "batch too large", "own"],
)
async def test_what_a_signature_forbids_never_reaches_the_backend(inputs, field, tmp_path):
    """Wrong inputs are INVALID_ARGUMENT with field, expected and actual; the next request is served."""
    (tmp_path / "scale.json").write_text('{"factor": 3}')
    async with running() as (workers, _):
        load = LoadSpec(
            "m", "m-1", 1, 1, tmp_path, "example-scaling", ModelConfig(backend="example"), 0
        )
        await workers.load("cpu", load, ignore)
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "m-1", 1, encode(inputs), timeout_s=None)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert caught.value.metadata["field"] == field
        assert {"expected", "actual"} <= caught.value.metadata.keys()
        good = encode({"x": np.ones((1, 4), np.float32)})
        await workers.infer("cpu", "m-1", 1, good, timeout_s=None)


async def test_a_backend_that_cannot_be_imported_is_not_available_and_the_others_are(tmp_path):
    """One broken backend is named with its cause; the rest of the worker serves."""
    config = dataclasses.replace(
        CONFIG, backends=("identity", "broken = no_such_module:Backend", "unheard-of")
    )
    async with running(config) as (workers, _):
        await workers.load("cpu", spec(), ignore)
        for name, cause in (("broken", "no_such_module"), ("unheard-of", "entry point")):
            with pytest.raises(ModelhostError) as caught:
                await workers.load("cpu", spec("x", backend=name), ignore)
            assert caught.value.reason is Reason.BACKEND_NOT_AVAILABLE
            assert caught.value.metadata["backend"] == name
            assert cause in caught.value.metadata["missing"]
            assert caught.value.metadata["available"] == "identity"


def test_only_backends_are_backends():
    """A target that is something else is refused, and says so."""
    found = registry.find([("path", "pathlib:Path"), ("identity", "")])
    assert list(found.backends) == ["identity"]
    assert "Backend" in found.unavailable["path"]


def test_a_backend_without_its_packages_is_listed_with_what_is_missing(monkeypatch):
    """Missing packages are named before anything is loaded."""
    identity = registry.find([("identity", "")]).backends["identity"]
    monkeypatch.setattr(identity, "packages", ("numpy", "no_such_package"))
    found = registry.find([("identity", "")])
    assert found.unavailable == {"identity": "missing packages: no_such_package"}
    with pytest.raises(ModelhostError) as caught:
        found.choose("m", "", "feature-extraction")
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL
    assert "not identity (missing packages: no_such_package)" in caught.value.message


def test_the_interface_is_the_five_methods():
    """What a backend has to write is load, signature, infer, health_check and unload, nothing else."""
    assert Backend.__abstractmethods__ == {
        "load", "signature", "infer", "health_check", "unload",
    }  # fmt: skip


def test_the_packaged_entry_points_are_the_builtin_backends():
    """What the distribution registers, and what a source tree finds by itself, are the same."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["modelhost.backends"] == registry.OWN
