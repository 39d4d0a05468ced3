"""Weights that a library fuses, and those of an installed class: what their worker leaves is adopted by the next one."""

from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker.backend import InferContext, LoadContext, Tensor
from modelhostd.worker.backends.generation.backend import TextGenerationBackend
from modelhostd.worker.backends.modules import installed
from modelhostd.worker.backends.modules.installed import InstalledModuleBackend
from modelhostd.worker.image import descriptions
from modelhostd.worker.imaging import Draft, Imaging
from tests.worker import generation_models
from tests.worker.generation_models import begin, run

KEY = ("a", 1)
FILE = "model.safetensors"


class Worker:
    """The images of one worker; ``before`` is the one whose place it takes, with what that left."""

    def __init__(self, device: str, before: "Worker | None" = None) -> None:
        self.before = before
        held = {"descriptor": -1} if before is None else before.left
        self.imaging = Imaging(device, **held)
        self.device = device

    def load(self, kind, folder: Path, task: str, **options):
        """Load a backend, from its files or from what was left; return it, and whether its image is what was left."""
        draft = Draft(self.imaging)
        adoption = None
        if self.before is not None:
            adoption = draft.adopt(KEY, lambda: False, lambda *_: None)
        backend = kind()
        memory = {"memory": draft.memory, "kept": adoption and adoption.weights}
        backend.load(LoadContext("m", folder, task, self.device, options=options, **memory))
        image = self.image = draft.finish(backend, keep=True)
        return backend, adoption is not None and image.uses(adoption.part)

    @cached_property
    def left(self):
        """What the next one is told of."""
        if self.before is not None:
            return self.before.left
        images = self.imaging.images
        kept = images.rest(self.image, lambda _: None)
        assert kept is not None
        return {"descriptor": images._arena._descriptor, "kept": {KEY: kept}}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Give a language model whose files have each expert's weights apart, which the library fuses."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(3)
    config = transformers.MixtralConfig(
        **generation_models.SIZES, intermediate_size=64, num_key_value_heads=2, vocab_size=258,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=96,
        eos_token_id=generation_models.END, bos_token_id=256, initializer_range=0.3,
    )  # fmt: skip
    generation_models.save_tokenizer(folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def answer(backend) -> bytes:
    """Return a text of a language model."""
    reader = begin(backend, "hello", max_tokens=12)
    run(backend)
    assert reader.error is None
    return reader.text


@pytest.mark.parametrize("device", ["cpu", "sim-0"])
def test_experts_that_were_fused_are_adopted_as_they_are(device, experts, tmp_path):
    """Without the weights' file, twice over, and the text is the same."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in experts.iterdir():
        (folder / path.name).symlink_to(path)
    worker = Worker(device)
    backend, _ = worker.load(TextGenerationBackend, folder, "text-generation")
    names = list(backend.torch_module().state_dict())
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    expected = answer(backend)
    (folder / FILE).unlink()
    for _ in range(2):
        worker = Worker(device, worker)
        backend, adopted = worker.load(TextGenerationBackend, folder, "text-generation")
        assert adopted
        assert answer(backend) == expected


def test_what_a_library_would_convert_once_more_is_read_again(experts, monkeypatch):
    """Where it makes other tensors of what was left, that is MODEL_NOT_LOADED: the host loads it from its files."""
    worker = Worker("cpu")
    worker.load(TextGenerationBackend, experts, "text-generation")
    taken = descriptions.Weights.tensors

    def converted(self, asked):
        return {name: tensor.clone() for name, tensor in taken(self, asked).items()}

    monkeypatch.setattr(descriptions.Weights, "tensors", converted)
    with pytest.raises(ModelhostError) as caught:
        Worker("cpu", worker).load(TextGenerationBackend, experts, "text-generation")
    assert caught.value.reason is Reason.MODEL_NOT_LOADED


class Doubler(torch.nn.Module):
    """A class that an operator might install."""

    inputs = (("x", "FP32", (-1, 64)),)
    outputs = (("y", "FP32", (-1, 64)),)

    def __init__(self, width=64):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def forward(self, x):
        """Return twice what the layer does."""
        return {"y": self.layer(x) * 2}


def test_what_an_installed_class_had_is_adopted(tmp_path, monkeypatch):
    """Its weights are views of what was read: the next worker needs no file for the same numbers."""
    monkeypatch.setattr(installed, "_find", lambda options: Doubler)
    save_file(Doubler().state_dict(), tmp_path / FILE)
    x = {"x": Tensor("FP32", np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64))}
    worker = Worker("sim-0")
    backend, _ = worker.load(InstalledModuleBackend, tmp_path, "other")
    expected = backend.infer(x, InferContext())["y"].array
    (tmp_path / FILE).unlink()
    backend, adopted = Worker("sim-0", worker).load(InstalledModuleBackend, tmp_path, "other")
    assert adopted
    assert (backend.infer(x, InferContext())["y"].array == expected).all()
