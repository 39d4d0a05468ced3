"""What the transformers backend does for each task: which class, which outputs, what is done with them."""

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from modelhostd.worker.backend import Array, TensorSpec
from modelhostd.worker.backends.pooling import Recipe, pool


class Task(abc.ABC):
    """One task over a text model: batches of tokens in, named outputs per item."""

    outputs: tuple[TensorSpec, ...]

    @staticmethod
    @abc.abstractmethod
    def mapping() -> Mapping[Any, Any]:
        """Return the library's table from configuration class to model class."""

    @staticmethod
    def may_lack(parameter: str) -> bool:
        """Whether the model's answer does not depend on a parameter that its files may lack."""
        del parameter
        return False

    @abc.abstractmethod
    def run(self, model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """Return each output for the items of one batch."""


class FeatureExtraction(Task):
    """Sentence embeddings: FP32 ``embedding`` [-1, dim]."""

    def __init__(self, config: Any, recipe: Recipe) -> None:
        self._recipe = recipe
        dimensions = int(config.hidden_size) * len(recipe.pooling)
        about = "sentence embeddings" + (", of length 1" if recipe.normalize else "")
        self.outputs = (TensorSpec("embedding", "FP32", (-1, dimensions), about),)

    @staticmethod
    def mapping() -> Mapping[Any, Any]:
        """Return the table of base models."""
        import transformers

        return transformers.MODEL_MAPPING

    @staticmethod
    def may_lack(parameter: str) -> bool:
        """Return whether it belongs to the pooler, which token embeddings do not pass."""
        return parameter.startswith("pooler.") or ".pooler." in parameter

    def run(self, model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """Return the pooled embeddings."""
        tokens = model(**batch).last_hidden_state
        return {"embedding": pool(self._recipe, tokens, batch["attention_mask"]).cpu().numpy()}


class TextClassification(Task):
    """Classes: FP32 ``scores`` and ``logits`` [-1, classes], BYTES ``label`` [-1] of the best one."""

    def __init__(self, config: Any) -> None:
        count = int(config.num_labels)
        # As transformers' own pipeline decides it.
        self._independent = config.problem_type == "multi_label_classification" or count == 1
        labels = tuple(str(config.id2label.get(n, f"LABEL_{n}")) for n in range(count))
        self._labels = np.empty(count, object)
        self._labels[:] = [label.encode() for label in labels]
        way = "each by itself" if self._independent else "summing to 1"
        self.outputs = (
            TensorSpec("scores", "FP32", (-1, count), f"probabilities, {way}", labels=labels),
            TensorSpec("label", "BYTES", (-1,), "name of the class with the highest score"),
            TensorSpec("logits", "FP32", (-1, count), "the model's raw output", labels=labels),
        )

    @staticmethod
    def mapping() -> Mapping[Any, Any]:
        """Return the table of sequence classifiers."""
        import transformers

        return transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    def run(self, model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """Return scores, labels and logits."""
        logits = model(**batch).logits.float()
        scores = logits.sigmoid() if self._independent else logits.softmax(-1)
        return {
            "scores": scores.cpu().numpy(),
            "label": self._labels[scores.argmax(-1).cpu().numpy()],
            "logits": logits.cpu().numpy(),
        }
