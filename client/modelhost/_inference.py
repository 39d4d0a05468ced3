"""What the client makes of the answers of models for the common tasks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelhost import _names
from modelhost._errors import InvalidArgument, invalid
from modelhost._tensors import Array
from modelhost.v1 import inference_service_pb2 as pb

TEXT = "text"
EMBEDDING = "embedding"
FEATURES = "feature-extraction"


@dataclass(frozen=True, slots=True)
class Label:
    """One class of a classifier, for one text."""

    name: str
    """Its name, or its number as a text where the model has no names."""
    score: float
    """Its probability, from 0 to 1, to six decimals."""
    index: int
    """Its number in the model, from 0."""


@dataclass(frozen=True, slots=True)
class Classification:
    """What a classifier says of one text."""

    labels: tuple[Label, ...]
    """The likeliest classes, the highest scores first."""

    @property
    def label(self) -> str:
        """The name of the likeliest class."""
        return self.labels[0].name

    @property
    def score(self) -> float:
        """The score of the likeliest class."""
        return self.labels[0].score


def embeddings(model: str, outputs: Mapping[str, Array], count: int) -> npt.NDArray[np.float32]:
    """Return the embeddings of ``count`` texts as (count, dimensions). Raises InvalidArgument."""
    array = outputs.get(EMBEDDING)
    if array is None or array.ndim != 2 or len(array) != count:
        raise _other(model, FEATURES, EMBEDDING, outputs)
    return array.astype(np.float32, copy=False)


def priority_parameter(priority: int) -> dict[str, int]:
    """Return the request parameter for a priority; 0 = none. Raises InvalidArgument."""
    check_priority(priority)
    return {"priority": priority} if priority else {}


def check_priority(priority: int) -> None:
    """Raise InvalidArgument for a priority that no request has."""
    if priority < 0:
        raise invalid("priority", "1, the most urgent, or more; 0 = none", str(priority))


def classify_request(
    model: str, texts: Iterable[str], top_k: int, *, version: int, priority: int
) -> pb.ClassifyRequest:
    """Return the request for the labels of texts. Raises InvalidArgument."""
    check_priority(priority)
    return pb.ClassifyRequest(
        model=f"models/{_names.model_id(model)}",
        texts=texts,
        top_k=top_k,
        version=version,
        priority=priority,
    )


def classifications(response: pb.ClassifyResponse) -> list[Classification]:
    """Return what a classifier says of each text."""
    return [
        Classification(tuple(Label(one.name, one.score, one.index) for one in found.labels))
        for found in response.classifications
    ]


def other_task(model: str, task: str) -> InvalidArgument:
    """Return the error of a model that gives no embeddings, because it is of another task."""
    return InvalidArgument(
        f"embed takes models of the task {FEATURES}; {model} is of the task {task or 'unknown'}",
        reason="INVALID_ARGUMENT",
        metadata={"field": "model", "expected": FEATURES, "actual": task},
        hint=f"`modelhost show {model}` says what it takes and gives",
    )


def _other(model: str, task: str, wanted: str, outputs: Mapping[str, Array]) -> InvalidArgument:
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
    return invalid("model", f"one of the task {task}, which answers {wanted}", f"{model}: {shapes}")
