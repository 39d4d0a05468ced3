"""From the model's scores for the next token to the token."""

from typing import Any

import torch

from modelhostd.worker.backends.generation.parameters import Parameters


class Sampler:
    """Picks the tokens of one text. With a seed the same scores give the same tokens on one device."""

    def __init__(self, parameters: Parameters, device: torch.device) -> None:
        import transformers.generation.logits_process as library

        self.greedy = parameters.temperature == 0
        self._processors: list[Any] = []
        if parameters.repetition_penalty != 1:
            self._processors.append(
                library.RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty)
            )
        self.plain = self.greedy and not self._processors
        """Whether it is the likeliest token as the model says it, so that one call does for a whole batch."""
        if self.greedy:
            return
        # In the library's own order.
        self._processors.append(library.TemperatureLogitsWarper(parameters.temperature))
        if parameters.top_k > 0:
            self._processors.append(library.TopKLogitsWarper(parameters.top_k))
        if parameters.top_p < 1:
            self._processors.append(library.TopPLogitsWarper(parameters.top_p))
        if parameters.min_p > 0:
            self._processors.append(library.MinPLogitsWarper(parameters.min_p))
        self._random = torch.Generator(device)
        if parameters.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(parameters.seed)

    def pick(self, tokens: list[int], scores: torch.Tensor) -> int:
        """Return the next token after ``tokens`` for ``scores`` [vocabulary]."""
        row = scores.unsqueeze(0)
        if self._processors:
            before = torch.tensor([tokens], device=scores.device)
            row = row.float()
            for processor in self._processors:
                row = processor(before, row)
        if self.greedy:
            return int(row.argmax(-1))
        chances = row.softmax(-1)
        return int(torch.multinomial(chances, 1, generator=self._random))
