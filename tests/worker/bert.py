"""What the tests of the transformers backend share: tiny models, and a backend in this process."""

from pathlib import Path

import numpy as np
import transformers

from modelhostd.worker.backend import InferContext, LoadContext, Tensor
from modelhostd.worker.backends.transformers import TransformersBackend

EMBEDDING = "feature-extraction"
CLASSIFICATION = "text-classification"


def tiny_config(**more):
    """Return a BERT of two small layers."""
    return transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, **more,
    )  # fmt: skip


def load(folder, task=EMBEDDING, **more):
    """Load a backend in this process."""
    backend = TransformersBackend()
    backend.load(LoadContext("m", Path(folder), task, "cpu", **more))
    return backend


def ask(backend, texts):
    """Send texts."""
    return backend.infer({"text": byte_strings(texts)}, InferContext())


def byte_strings(texts):
    """Return texts as a BYTES tensor."""
    array = np.empty(len(texts), object)
    array[:] = [text.encode() for text in texts]
    return Tensor("BYTES", array)
