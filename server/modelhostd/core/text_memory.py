"""What language models remember of the texts that they are at: their caches of keys and values. Pure.

A token takes ``2 * layers * key and value heads * head size`` numbers, in every layer a key and a value for each such head. How
many tokens there are at a time is bounded: the worker takes no text in beyond ``cache_tokens``, and the daemon reserves what they
take before it loads the model. Both go by this page.
"""

from collections.abc import Mapping
from typing import Any

from modelhostd.core.resources import ModelConfig
from modelhostd.core.values import dataclass

TASK = "text-generation"
"""The task whose models remember, and the name of the backend that keeps to the bound."""
MAX_SEQUENCES = 16
"""Texts at a time where ``backend_options.max_sequences`` says nothing."""
CACHE_TOKENS = 16_384
"""Tokens at a time where ``backend_options.cache_tokens`` says nothing, ..."""
WHOLE_CONTEXT_TOKENS = 32_768
"""... or one text as long as the model takes it, up to this."""

NUMBER_MAX = 1 << 24
"""Of what a config.json may say; more is no model."""
_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
_PRECISION_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, slots=True)
class TextMemory:
    """What a model remembers of a token: so many numbers of so many bytes. ``context_tokens``: the longest text, 0 = not said."""

    token_numbers: int
    number_bytes: int
    context_tokens: int

    def cache_bytes(self, config: ModelConfig) -> int:
        """Return the most that a model takes for the texts that it is at, under its config; 0 = not known."""
        longest = [n for n in (config.max_sequence_length or 0, self.context_tokens) if n > 0]
        if not longest:
            return 0
        options = config.backend_options
        sequences = _number(options, "max_sequences") or MAX_SEQUENCES
        tokens = cache_tokens(min(longest), sequences, _number(options, "cache_tokens"))
        each = _PRECISION_BYTES.get(config.precision, self.number_bytes)
        return tokens * self.token_numbers * each


def cache_tokens(context_tokens: int, sequences: int, chosen: int) -> int:
    """Return how many tokens a model remembers at a time, padding included; ``chosen`` 0 = the operator did not say."""
    usual = max(CACHE_TOKENS, min(context_tokens, WHOLE_CONTEXT_TOKENS))
    return min(context_tokens * sequences, chosen or usual)


def read_config(document: Mapping[str, Any]) -> TextMemory | None:
    """Return what a config.json in the words of the transformers library says; None = not that of such a model."""
    nested = document.get("text_config")
    config = nested if isinstance(nested, dict) else document
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = _number(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    width = _number(config, "hidden_size", "n_embd", "d_model")
    if not (layers and heads and width):
        return None
    pairs = _number(config, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        pairs = 1
    size = _number(config, "head_dim") or max(1, width // heads)
    kind = config.get("dtype") or config.get("torch_dtype") or document.get("torch_dtype")
    context = _number(config, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    return TextMemory(2 * layers * pairs * size, _BYTES.get(str(kind), 4), context)


def _number(said: Mapping[str, Any], *names: str) -> int:
    """Return the first of these that is a whole number above 0; 0 = none is."""
    for name in names:
        value: Any = said.get(name)
        if type(value) in (int, float) and 1 <= value <= NUMBER_MAX and value == int(value):
            return int(value)
    return 0
