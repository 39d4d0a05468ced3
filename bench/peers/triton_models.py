"""The models that Triton serves by its python backend; its stub imports this in the peer's environment.

Written as its documentation does: one call of ``execute`` gets the requests that run together. Each answer of
the sentence model says what the model took, of which the figures of overhead are made.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]

from bench.peers.minilm import MiniLM


class Identity:
    """Outputs are the inputs."""

    def execute(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Answer requests."""
        return [
            triton.InferenceResponse(
                [
                    triton.Tensor(
                        "OUTPUT0", triton.get_input_tensor_by_name(one, "INPUT0").as_numpy()
                    )
                ]
            )
            for one in requests
        ]


class Sentences:
    """Texts to embeddings: all that came together at once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model from the folder that a link in the repository names."""
        folder = Path(args["model_repository"], args["model_version"], "weights")
        self._model = MiniLM(folder)

    def execute(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Answer requests."""
        texts = [
            [text.decode() for text in array.reshape(-1).tolist()]
            for array in (
                triton.get_input_tensor_by_name(one, "text").as_numpy() for one in requests
            )
        ]
        begun = time.monotonic_ns()
        vectors = self._model.embed([text for of_one in texts for text in of_one])
        took = time.monotonic_ns() - begun
        answers, start = [], 0
        for of_one in texts:
            count = len(of_one)
            outputs = [
                triton.Tensor("embedding", vectors[start : start + count]),
                triton.Tensor("model_ns", np.full((count, 1), took, np.int64)),
            ]
            answers.append(triton.InferenceResponse(outputs))
            start += count
        return answers
