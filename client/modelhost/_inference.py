"""What the client makes of the answers of models for the common tasks."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelhost._errors import InvalidArgument, invalid
from modelhost._tensors import Array

TEXT = "text"
EMBEDDING = "embedding"
LABEL = "label"
SCORES = "scores"


@dataclass(frozen=True, slots=True)
class Classification:
    """What a classifier says of one text."""

    label: str
    """The name of the best class."""
    score: float
    """Its probability, from 0 to 1."""
    scores: tuple[float, ...]
    """The probabilities of all classes, in the model's order."""


def embeddings(model: str, outputs: Mapping[str, Array], count: int) -> npt.NDArray[np.float32]:
    """Return the embeddings of ``count`` texts as (count, dimensions). Raises InvalidArgument."""
    array = outputs.get(EMBEDDING)
    if array is None or array.ndim != 2 or len(array) != count:
        raise _other(model, "feature-extraction", EMBEDDING, outputs)
    return array.astype(np.float32, copy=False)


def classifications(model: str, outputs: Mapping[str, Array], count: int) -> list[Classification]:
    """Return what a classifier says of ``count`` texts. Raises InvalidArgument."""
    labels, scores = outputs.get(LABEL), outputs.get(SCORES)
    if labels is None or scores is None or labels.shape != (count,) or scores.shape[:1] != (count,):
        raise _other(model, "text-classification", f"{LABEL} and {SCORES}", outputs)
    return [
        Classification(label.decode("utf-8", "replace"), max(row), tuple(row))
        for label, row in zip(labels.tolist(), scores.tolist(), strict=True)
    ]


def _other(model: str, task: str, wanted: str, outputs: Mapping[str, Array]) -> InvalidArgument:
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
    return invalid("model", f"one of the task {task}, which answers {wanted}", f"{model}: {shapes}")
