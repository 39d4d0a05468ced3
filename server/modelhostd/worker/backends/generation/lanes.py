"""Decodes several sequences in one pass of the model: their caches of keys and values as one, padded at the left.

transformers has continuous batching of its own (5.23, ``ContinuousBatchingManager``). It works on the CPU too, but takes nine
tenths of the memory it finds for its cache, which the ledger knows nothing of, and 17.5 s where plain
``generate`` took 0.7 s (4 layers, 8 prompts, 32 tokens, 2 cores).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from modelhostd.core.values import dataclass

PROMPT_TOKENS = 512
"""Of a prompt in one pass: between two passes others get their tokens, and who has gone is noticed."""

Layers = list[tuple[torch.Tensor, torch.Tensor]]


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
    """Sequences that go through the model together; ``rows`` are in the order of the batch."""

    def __init__(self, model: Any) -> None:
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
        self.rows: list[Row] = []
        self._cache: Any = None
        self._pads: list[int] = []

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
            self.rows.append(row)
            self._pads.append(0)
            return
        shared = self._shared()
        longest = max([self._width(), row.length])
        parts: list[Layers] = []
        if shared:
            parts.append([_pad(k, v, longest) for k, v in self._layers()])
        parts.append([_pad(k, v, longest) for k, v in row.layers])
        cache = self._join_layers(
            [
                (
                    torch.cat([part[n][0] for part in parts]),
                    torch.cat([part[n][1] for part in parts]),
                )
                for n in range(len(parts[0]))
            ]
        )
        self._pads = [
            pad + longest - self._width() if index in shared else pad
            for index, pad in enumerate(self._pads)
        ]
        # Rows that share a pass come first, so that their number in the batch is their place here.
        self.rows.insert(len(shared), row)
        self._pads.insert(len(shared), longest - row.length)
        row.layers = None
        self._cache = cache

    def leave(self, gone: Row, *, keep: bool = False) -> None:
        """Take a sequence out; with ``keep`` it can come back. Where that fails nothing has changed."""
        index = next(n for n, row in enumerate(self.rows) if row is gone)
        pad, pads = self._pads[index], self._pads[:index] + self._pads[index + 1 :]
        if gone.cache is None:
            layers = self._layers()
            kept = None
            if keep:
                kept = [
                    (k[index : index + 1, :, pad:].clone(), v[index : index + 1, :, pad:].clone())
                    for k, v in layers
                ]
            left = [n for n in range(len(layers[0][0])) if n != index]
            cache = None
            if left:
                spare = min(pads[: len(left)])
                pads = [p - spare if n < len(left) else p for n, p in enumerate(pads)]
                cache = self._join_layers(
                    [(k[left, :, spare:], v[left, :, spare:]) for k, v in layers]
                )
            gone.layers, self._cache = kept, cache
        self._pads = pads
        del self.rows[index]

    def clear(self) -> None:
        """Forget all sequences."""
        self.rows, self._pads, self._cache = [], [], None

    def step(self) -> torch.Tensor:
        """Give each sequence its token; return the scores [sequences, vocabulary] of the next ones."""
        scores = []
        shared = self._shared()
        if shared:
            scores.append(self._step_shared(self.rows[: len(shared)]))
        for row in self.rows[len(shared) :]:
            ids = torch.tensor([[row.token]], device=self._device)
            out = self._model(input_ids=ids, past_key_values=row.cache, use_cache=True)
            row.cache = out.past_key_values
            scores.append(out.logits[:, -1])
        for row in self.rows:
            row.length += 1
        return torch.cat(scores)

    def _step_shared(self, rows: Sequence[Row]) -> torch.Tensor:
        ids = torch.tensor([[row.token] for row in rows], device=self._device)
        positions = torch.tensor([[row.length] for row in rows], device=self._device)
        pads = self._pads[: len(rows)]
        mask = None
        if any(pads):
            places = torch.arange(self._width() + 1, device=self._device)
            mask = (places >= torch.tensor(pads, device=self._device).unsqueeze(1)).long()
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        scores: torch.Tensor = out.logits[:, -1]
        return scores

    def _is_plain(self, cache: Any) -> bool:
        """Whether a cache is keys and values of all tokens. Exactly this class: those derived from it drop or pack what is far back."""
        layers = getattr(cache, "layers", ())
        return bool(layers) and all(type(layer) is self._plain_layer for layer in layers)

    def _shared(self) -> range:
        """Return the places of the rows that share a pass: the first ones."""
        return range(sum(1 for row in self.rows if row.cache is None))

    def _width(self) -> int:
        return 0 if self._cache is None else int(self._cache.get_seq_length())

    def _layers(self) -> Layers:
        return [(layer.keys, layer.values) for layer in self._cache.layers]

    def _join_layers(self, layers: Layers) -> Any:
        """Return a cache of these keys and values."""
        cache = self._new_cache()
        for number, (keys, values) in enumerate(layers):
            cache.update(keys, values, number)
        return cache


def _pad(
    keys: torch.Tensor, values: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values with room at their left, up to ``length``."""
    room = (0, 0, length - keys.shape[-2], 0)
    pad = torch.nn.functional.pad
    return pad(keys, room), pad(values, room)
