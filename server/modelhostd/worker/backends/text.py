"""Texts and token tensors of a request to batches that a model takes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from modelhostd.core.values import dataclass
from modelhostd.worker.backend import Array, BadInputError, Tensor, TensorSpec
from modelhostd.worker.batching import passes

CHUNK_ITEMS = 32
"""Items in one pass through a model; between two passes a cancellation is noticed."""
CHUNK_CHARACTERS = 2**20
"""Characters that are made tokens at once, unless one text has more: a tokenizer takes a second or two for so many."""
HEAD_CHARACTERS = 16
"""For each token that is wanted, of a long text: what is looked at first, several times as long as words are."""
LEAST_HEAD_CHARACTERS = 4096
"""Looked at in any case: a quarter of it is longer than the longest word that a tokenizer takes apart (of 100 characters, for BERT). The
beginning of a longer one, which is unknown as a whole, would else be taken for words."""
PASS_TOKENS = 24
"""What one pass more through a model costs on a CPU, in tokens of one thread."""
PASS_THREADS = 8
"""Threads that make tokens cheaper: a pass of small matrices gains little from more."""
MAX_TEXT_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class TextLimits:
    """What a model and its tokenizer take. ``segments`` = sizes of token_type_ids; 0 = not taken."""

    max_tokens: int
    max_positions: int
    vocabulary: int
    segments: int


def inputs_of(limits: TextLimits) -> tuple[tuple[TensorSpec, ...], ...]:
    """Return the sets of inputs that a text model takes, ``text`` first."""
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if limits.segments else [])
    tokens = tuple(
        TensorSpec(name, "INT64", (-1, -1), optional=name == "token_type_ids") for name in names
    )
    most = f", at most {limits.max_positions} tokens each" if limits.max_positions else ""
    what = (
        f"UTF-8 texts, one per item, each cut to {limits.max_tokens} tokens; or, in its place, "
        f"INT64 input_ids and attention_mask [-1, -1]{most}"
    )
    plain, column = (TensorSpec("text", "BYTES", shape, what) for shape in ((-1,), (-1, 1)))
    return (plain,), (column,), tokens


def find_limits(config: Any, tokenizer: Any, asked: int, recipe: int) -> TextLimits:
    """Return the limits of a model from its configuration, its tokenizer and what an operator asked."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    if positions and getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        # Their positions start behind the padding index.
        positions -= int(getattr(config, "pad_token_id", 1) or 0) + 1
    own = int(tokenizer.model_max_length)
    given = [length for length in (recipe, positions, asked) if length > 0]
    given += [own] if 0 < own < 10**6 else []
    wants_segments = "token_type_ids" in tokenizer.model_input_names
    return TextLimits(
        max_tokens=min(given, default=512),
        max_positions=positions,
        vocabulary=int(config.vocab_size),
        segments=int(getattr(config, "type_vocab_size", 0) or 0) if wants_segments else 0,
    )


def decode(texts: Array, name: str = "text") -> list[str]:
    """Return BYTES elements as texts. Raises :class:`BadInputError` naming the element of ``name``."""
    decoded = []
    for index, data in enumerate(texts.reshape(-1).tolist()):
        if len(data) > MAX_TEXT_BYTES:
            raise BadInputError(f"{name}[{index}]", f"at most {MAX_TEXT_BYTES} bytes", len(data))
        try:
            decoded.append(data.decode())
        except UnicodeDecodeError as error:
            raise BadInputError(f"{name}[{index}]", "UTF-8", f"byte {error.start} is not") from None
    return decoded


def pass_price(device: torch.device, threads: int = 0) -> float:
    """Return what one pass more through a model costs, in tokens, with so many threads; 0 = torch's own number.

    Measured for MiniLM on a CPU: 9 ms of calls beside 0.35 ms of a thread for each token. A larger model's tokens cost
    more, so for it this is too much rather than too little. Elsewhere calls cost more than tokens: no more passes.
    """
    if device.type != "cpu":
        return math.inf
    return PASS_TOKENS * min(threads or torch.get_num_threads(), PASS_THREADS)


def tokenize(
    tokenizer: Any, texts: list[str], limits: TextLimits, price: float
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield (positions in ``texts``, padded batch), texts of like length together; ``price``: :func:`passes`."""
    order = list(range(len(texts)))
    if len(texts) > CHUNK_ITEMS:
        order.sort(key=lambda row: len(texts[row]))
    for rows in _chunks(order, texts):
        batch = _encode(tokenizer, [texts[row] for row in rows], limits.max_tokens)
        mask = batch["attention_mask"]
        lengths = mask.sum(1).tolist()
        for places in passes(lengths, price):
            if len(places) == len(rows):
                yield rows, dict(batch)
                break
            longest = max(1, *(lengths[place] for place in places))
            # Padding is where the tokenizer puts it: at the end, or for some models at the beginning.
            left = tokenizer.padding_side == "left"
            kept = slice(mask.shape[1] - longest, None) if left else slice(longest)
            yield (
                [rows[place] for place in places],
                {name: part[places, kept] for name, part in batch.items()},
            )


def _chunks(order: Sequence[int], texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the positions of ``texts`` in that order, so many as are made tokens at once."""
    rows: list[int] = []
    characters = 0
    for row in order:
        length = len(texts[row])
        if rows and (len(rows) == CHUNK_ITEMS or characters + length > CHUNK_CHARACTERS):
            yield rows
            rows, characters = [], 0
        rows.append(row)
        characters += length
    if rows:
        yield rows


def _encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Any:
    """Return the padded batch of texts, each cut to its first ``max_tokens`` tokens.

    A tokenizer reads a text to its end before it cuts: 1.6 s for 1 MiB. So of a long one the beginning is tried first. Only
    where that had too few tokens, or the last of them are so near its end that what follows might change them, the whole.
    """

    def encode(wanted: Sequence[str]) -> Any:
        return tokenizer(
            wanted, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )

    head = max(max_tokens * HEAD_CHARACTERS, LEAST_HEAD_CHARACTERS)
    long = [place for place, text in enumerate(texts) if len(text) > 2 * head]
    if not (long and tokenizer.is_fast and tokenizer.truncation_side == "right"):
        return encode(texts)
    heads = list(texts)
    for place in long:
        heads[place] = heads[place][:head]
    batch = encode(heads)
    for place in long:
        found = batch.encodings[place]
        if sum(found.attention_mask) < max_tokens or max(map(max, found.offsets)) > head * 3 // 4:
            heads[place] = texts[place]
    return batch if all(len(heads[place]) == head for place in long) else encode(heads)


def read_tokens(tokenizer: Any, prompt: str, most: int, *, special: bool) -> tuple[list[int], bool]:
    """Return the tokens of a prompt, and whether of all of it: not where its beginning has far more than ``most``."""
    head = most * HEAD_CHARACTERS
    if len(prompt) > 2 * head:
        tokens = list(tokenizer(prompt[:head], add_special_tokens=special)["input_ids"])
        if len(tokens) > most + most // 4:
            return tokens, False
    return list(tokenizer(prompt, add_special_tokens=special)["input_ids"]), True


def join_tokens(requests: Sequence[Mapping[str, Tensor]], padding: int) -> dict[str, Tensor]:
    """Return the token tensors of several requests as one, the shorter ones padded and masked at their ends."""
    longest = max(request["input_ids"].array.shape[1] for request in requests)
    fill = {"input_ids": padding}
    return {
        name: Tensor(
            first.datatype,
            np.concatenate(
                [
                    np.pad(
                        array := request[name].array,
                        ((0, 0), (0, longest - array.shape[1])),
                        constant_values=fill.get(name, 0),
                    )
                    for request in requests
                ]
            ),
        )
        for name, first in requests[0].items()
    }


def take_tokens(
    inputs: Mapping[str, Tensor], limits: TextLimits
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield (rows, batch) of token tensors that came in a request, after checking every number.

    An id beyond the vocabulary would read foreign memory or break a GPU's context for good.
    """
    shape = inputs["input_ids"].array.shape
    if not 0 < shape[1] <= (limits.max_positions or shape[1]):
        raise BadInputError("input_ids", f"1 to {limits.max_positions} tokens", shape[1])
    bounds = {
        "input_ids": limits.vocabulary,
        "attention_mask": 2,
        "token_type_ids": limits.segments,
    }
    for name, tensor in inputs.items():
        if tensor.array.shape != shape:
            raise BadInputError(name, f"shape {list(shape)} as input_ids", list(tensor.array.shape))
        low, high = int(tensor.array.min()), int(tensor.array.max())
        if low < 0 or high >= bounds[name]:
            raise BadInputError(name, f"0 to {bounds[name] - 1}", f"{low} to {high}")
    for start in range(0, shape[0], CHUNK_ITEMS):
        rows = list(range(start, min(start + CHUNK_ITEMS, shape[0])))
        # A copy: the request's memory is read-only, unaligned, and not ours for long.
        yield (
            rows,
            {
                name: torch.from_numpy(np.array(tensor.array[rows[0] : rows[-1] + 1], np.int64))
                for name, tensor in inputs.items()
            },
        )
