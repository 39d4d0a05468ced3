"""What language models remember of a token, and how many tokens there are at a time."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.resources import ModelConfig
from modelhostd.core.text_memory import TextMemory, cache_tokens, read_config

LLAMA = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("document", "token_bytes"),
    [
        (LLAMA, 131_072),
        ({**LLAMA, "num_key_value_heads": None}, 524_288),
        ({**LLAMA, "head_dim": 64}, 65_536),
        ({**LLAMA, "multi_query": True}, 16_384),
        ({"text_config": LLAMA, "vision_config": {}}, 131_072),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}, 73_728),
    ],
)
def test_a_token_takes_what_the_config_says(document: dict[str, Any], token_bytes: int) -> None:
    """Keys and values of all layers, in as many bytes as the weights are stored in; published figures of known models."""
    found = read_config(document)
    assert found is not None
    assert found.token_numbers * found.number_bytes == token_bytes


def test_what_is_no_language_model_remembers_nothing() -> None:
    """Without layers, heads and a width there is nothing to tell."""
    for document in (
        {},
        {"n_layer": 2},
        {**LLAMA, "hidden_size": 0},
        {**LLAMA, "num_hidden_layers": True},
    ):
        assert read_config(document) is None


def test_the_bound_goes_by_context_and_options() -> None:
    """A whole context up to 32,768 tokens, at least 16,384 of all texts, what the operator says, never more than can be."""
    assert cache_tokens(1_024, 2, 0) == 2_048
    assert cache_tokens(1_024, 256, 0) == 16_384
    assert cache_tokens(32_768, 16, 0) == 32_768
    assert cache_tokens(131_072, 16, 0) == 32_768
    assert cache_tokens(131_072, 16, 200_000) == 200_000
    assert cache_tokens(1_024, 2, 200_000) == 2_048


def test_it_is_reserved_as_the_model_is_configured() -> None:
    """Precision, the longest input, and the options of the backend decide."""
    memory = read_config(LLAMA)
    assert memory is not None
    assert memory.cache_bytes(ModelConfig()) == 16_384 * 131_072
    assert memory.cache_bytes(ModelConfig(precision="fp32")) == 2 * 16_384 * 131_072
    assert memory.cache_bytes(ModelConfig(max_sequence_length=100)) == 1_600 * 131_072
    options = {"max_sequences": 2.0, "cache_tokens": 1_000}
    assert memory.cache_bytes(ModelConfig(backend_options=options)) == 1_000 * 131_072
    assert TextMemory(8, 2, 0).cache_bytes(ModelConfig()) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*LLAMA, "text_config", "head_dim", "n_layer"]), JSON))
def test_any_config_is_read_without_harm(document: dict[str, Any]) -> None:
    """Whatever a file from outside says, the answer is nothing or numbers that can be reserved."""
    found = read_config(document)
    assert found is None or 0 <= found.cache_bytes(ModelConfig()) < 1 << 140
