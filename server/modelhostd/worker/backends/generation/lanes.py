"""Decodes several sequences in one pass of the model: their keys and values side by side, padded at the left.

transformers has continuous batching of its own (5.23, ``ContinuousBatchingManager``). It works on the CPU too, but takes nine
tenths of the memory it finds for its cache, which the ledger knows nothing of, and 17.5 s where plain
``generate`` took 0.7 s (4 layers, 8 prompts, 32 tokens, 2 cores).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from modelhostd.core.values import dataclass
from modelhostd.worker.backends.generation.slab import Layers, Slab

PROMPT_TOKENS = 512
"""Of prompts in one pass: between two passes others get their tokens, and who has gone is noticed."""


@dataclass(slots=True)
class Row:
    """What a model remembers of one sequence, and the token that it gets next.

    ``layers``: keys and values [1, heads, length, size] of each layer while it is outside of a lane. ``cache`` is the library's
    own object instead: of a prompt on its way, and for models that remember in other ways and so cannot share a pass.
    """

    length: int
    token: int
    layers: Layers | None = None
    cache: Any = None


class Lane:
    """Sequences that go through the model together."""

    def __init__(self, model: Any, most_tokens: int, price: float) -> None:
        """``most_tokens`` is what memory for all of them together is meant for, padding included; ``price`` what a pass costs, in tokens."""
        import transformers

        self._model = model
        self._new_cache = transformers.DynamicCache
        self._plain_layer = transformers.cache_utils.DynamicLayer
        names = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in names
        self._stateful = bool(getattr(model, "_is_stateful", False))
        self._in_parts = not self._stateful
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._device = next(model.parameters()).device
        self._price = price
        self._plain = False
        """Whether a pass has shown that sequences of this model can share one."""
        self._sharing: list[Row] = []
        """Those in the slab, in its order."""
        self._alone: list[Row] = []
        self._slab = Slab(most_tokens)

    @property
    def rows(self) -> list[Row]:
        """All sequences, in the order of the scores."""
        return [*self._sharing, *self._alone]

    def fit_together(self, lengths: Sequence[int]) -> bool:
        """Whether prompts of such lengths go through the model in one pass, for less than each in its own."""
        whole = len(lengths) * max(lengths)
        cheap = whole - sum(lengths) <= self._price * (len(lengths) - 1)
        return self._plain and whole <= PROMPT_TOKENS and cheap

    def prefill_together(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Row, torch.Tensor]]:
        """Run several prompts in one pass; return for each its row and the scores as :meth:`prefill` does.

        They are filled up behind their ends: there no token of theirs looks.
        """
        longest = max(map(len, prompts))
        ends = sorted({len(prompt) - 1 for prompt in prompts})
        ids = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        keep = {"logits_to_keep": torch.tensor(ends, device=self._device)} if self._keep else {}
        cache: Any = self._new_cache()
        out = self._model(
            input_ids=torch.tensor(ids, device=self._device),
            past_key_values=cache,
            use_cache=True,
            **keep,
        )
        made = []
        for n, prompt in enumerate(prompts):
            length = len(prompt)
            layers = [
                (layer.keys[n : n + 1, :, :length], layer.values[n : n + 1, :, :length])
                for layer in cache.layers
            ]
            at = ends.index(length - 1) if self._keep else length - 1
            made.append((Row(length, 0, layers), out.logits[n, at]))
        return made

    def prefill(
        self, tokens: Sequence[int], begun: Row | None = None
    ) -> tuple[Row, torch.Tensor | None]:
        """Run the next tokens of a prompt, the first ones where nothing is ``begun``.

        Returns its row, not in the lane yet, and the scores [vocabulary] of the token after it; None = some are left.
        """
        at = begun.length if begun is not None else 0
        part = tokens[at : at + PROMPT_TOKENS] if self._in_parts else tokens[at:]
        cache = begun.cache if begun is not None else None
        if cache is None and not self._stateful:
            cache = self._new_cache()
        given = {} if cache is None else {"past_key_values": cache}
        ids = torch.tensor([part], device=self._device)
        out = self._model(input_ids=ids, use_cache=True, **given, **self._keep)
        row = Row(at + len(part), 0, cache=out.past_key_values)
        self._plain = self._takes_positions and self._is_plain(row.cache)
        if row.length == len(tokens):
            return row, out.logits[0, -1]
        if self._is_plain(row.cache):
            return row, None
        # Whether it could be run on from its middle nobody can tell.
        self._in_parts = False
        return self.prefill(tokens)

    def join(self, row: Row) -> None:
        """Have a sequence go with the others from the next pass on. Where that fails nothing has changed."""
        if self._takes_positions and self._is_plain(row.cache):
            row.layers = [(layer.keys, layer.values) for layer in row.cache.layers]
            row.cache = None
        if row.layers is None:
            self._alone.append(row)
            return
        self._slab.add(row.layers)
        row.layers = None
        self._sharing.append(row)

    def leave(self, gone: Row, *, keep: bool = False) -> None:
        """Take a sequence out; with ``keep`` it can come back. Where that fails nothing has changed."""
        if gone.cache is not None:
            self._alone = [row for row in self._alone if row is not gone]
            return
        at = next(n for n, row in enumerate(self._sharing) if row is gone)
        gone.layers = self._slab.copy(at, gone.length) if keep else None
        last = self._sharing.pop()
        if last is not gone:
            self._sharing[at] = last
        self._slab.remove(at, max((row.length for row in self._sharing), default=0))

    def clear(self) -> None:
        """Forget all sequences."""
        self._sharing, self._alone = [], []
        self._slab.clear()

    def step(self) -> torch.Tensor:
        """Give each sequence its token; return the scores [sequences, vocabulary] of the next ones."""
        scores = []
        if self._sharing:
            scores.append(self._step_shared(self._sharing))
        for row in self._alone:
            ids = torch.tensor([[row.token]], device=self._device)
            out = self._model(input_ids=ids, past_key_values=row.cache, use_cache=True)
            row.cache = out.past_key_values
            scores.append(out.logits[:, -1])
        for row in self.rows:
            row.length += 1
        return torch.cat(scores) if len(scores) > 1 else scores[0]

    def _step_shared(self, rows: Sequence[Row]) -> torch.Tensor:
        slab = self._slab
        slab.make_room()
        ids = torch.tensor([[row.token] for row in rows], device=self._device)
        positions = torch.tensor([[row.length] for row in rows], device=self._device)
        pads = [slab.width - row.length for row in rows]
        mask = None
        if any(pads):
            places = torch.arange(slab.width + 1, device=self._device)
            mask = (places >= torch.tensor(pads, device=self._device).unsqueeze(1)).long()
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=slab.cache,
            use_cache=True,
        )
        slab.written()
        scores: torch.Tensor = out.logits[:, -1]
        return scores

    def _is_plain(self, cache: Any) -> bool:
        """Whether a cache is keys and values of all tokens. Exactly this class: those derived from it drop or pack what is far back."""
        layers = getattr(cache, "layers", ())
        return bool(layers) and all(
            type(layer) is self._plain_layer and layer.is_initialized for layer in layers
        )
