"""What the client makes of the answers of models for the common tasks."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelhost._errors import Code, ModelhostError, make_error
from modelhost._tensors import Array

TEXT = "text"
EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Classification:
    """One class of one text: the label, and the model's score for it, from 0 to 1."""

    label: str
    score: float


def embeddings(model: str, outputs: Mapping[str, Array], count: int) -> npt.NDArray[np.float32]:
    """Return the embeddings of ``count`` texts as (count, dimensions). Raises Unimplemented."""
    array = outputs.get(EMBEDDING)
    if array is None or array.ndim != 2 or len(array) != count:
        raise _other(model, "feature-extraction", EMBEDDING, outputs)
    return array.astype(np.float32, copy=False)


def _other(model: str, task: str, wanted: str, outputs: Mapping[str, Array]) -> ModelhostError:
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
    return make_error(
        f"model '{model}' does not answer like one for {task}: expected {wanted}, got {shapes}",
        code=Code.UNIMPLEMENTED,
        reason="UNIMPLEMENTED",
    )
