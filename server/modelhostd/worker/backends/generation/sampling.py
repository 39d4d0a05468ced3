"""From the model's scores for the next token to the token.

The meanings and their order are the library's (temperature, ``top_k``, ``top_p``, ``min_p``); its own classes sort the whole
vocabulary for each of the last two, and its draw makes a random number for each token: 6 ms of 32,000 scores on a
core, where a small model's pass takes 3. What is drawn here comes of one number, from the few that are likely.
"""

from collections.abc import Sequence

import torch

from modelhostd.worker.backends.generation.parameters import Parameters

NUCLEUS = 256
"""Tokens among which ``top_p`` of the chances are looked for, before all are sorted."""
COLD = 1e-5
"""Temperatures below this mean the likeliest token: scores divided by them are no numbers any more."""


class Sampler:
    """Picks the tokens of one text. With a seed the same scores give the same tokens on one device."""

    def __init__(self, parameters: Parameters, prompt: Sequence[int], device: torch.device) -> None:
        self._parameters = parameters
        self._prompt = prompt
        self._seen: torch.Tensor | None = None
        """Of each token whether it was there before; made where that matters."""
        self._greedy = parameters.temperature < COLD
        self.plain = self._greedy and parameters.repetition_penalty == 1
        """Whether it is the likeliest token as the model says it, so that one call does for a whole batch."""
        if self._greedy:
            return
        self._random = torch.Generator(device)
        if parameters.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(parameters.seed)

    def pick(self, scores: torch.Tensor) -> int:
        """Return the next token for ``scores`` [vocabulary]. Raises ``ValueError`` where they are no numbers."""
        asked = self._parameters
        scores = scores.float()
        penalty = asked.repetition_penalty
        if penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros_like(scores, dtype=torch.bool)
                self._seen[list(self._prompt)] = True
            less_likely = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self._seen, less_likely, scores)
        token = int(scores.argmax()) if self._greedy else self._draw(scores / asked.temperature)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _draw(self, scores: torch.Tensor) -> int:
        asked = self._parameters
        chances, tokens = choices(scores.softmax(-1), asked.top_k, asked.top_p, asked.min_p)
        # In FP64: added up in FP32, the last of a large vocabulary would be lost.
        sums = chances.double().cumsum(-1)
        part = torch.rand(1, generator=self._random, device=sums.device, dtype=sums.dtype)
        place = int(torch.searchsorted(sums, part * sums[-1:], right=True))
        if not float(sums[-1]) > 0:
            raise ValueError("the model's scores are not numbers")
        place = min(place, len(sums) - 1)
        return place if tokens is None else int(tokens[place])


def choices(
    chances: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what may be drawn: chances, not always of sum 1, and their tokens (None = all, in their order)."""
    tokens = None
    if 0 < top_k < len(chances):
        chances, tokens = chances.topk(top_k)
        chances = chances / chances.sum()
    if top_p < 1:
        if tokens is None:
            chances, tokens = _likeliest(chances, top_p)
        before = chances.cumsum(-1) - chances
        chances = chances * (before < top_p)
    if min_p > 0:
        chances = chances * (chances >= min_p * chances.max())
    return chances, tokens


def _likeliest(chances: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest tokens, in their order, which have this share of the chances or are all."""
    if len(chances) > NUCLEUS:
        top, tokens = chances.topk(NUCLEUS)
        if float(top.sum()) >= share:
            return top, tokens
    return chances.sort(descending=True)
