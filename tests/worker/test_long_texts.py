"""A text far longer than a model takes costs little: only as much of it is made tokens as has to be."""

import pytest
import transformers

from modelhostd.worker.backends.text import (
    CHUNK_CHARACTERS,
    HEAD_CHARACTERS,
    LEAST_HEAD_CHARACTERS,
    TextLimits,
    read_tokens,
    tokenize,
)

pytestmark = pytest.mark.timeout(600)
"""The first one imports a library for seconds, which on a swamped machine is more than a minute."""

LIMITS = TextLimits(max_tokens=16, max_positions=512, vocabulary=30522, segments=2)
HEAD = max(LIMITS.max_tokens * HEAD_CHARACTERS, LEAST_HEAD_CHARACTERS)
LONG = {
    "words": "an answer, in Zürich 東京 🙂 " * 1000,
    "one word": "a" * 30_000,
    "blanks before": " " * 30_000 + "and then words " * 20,
    "few tokens first": "a" * (HEAD - 6) + " and many behind them" * 2000,
    "longer than words": " " * 160 + "a" * 120 + " and many behind it" * 2000,
    "cut in a word": "x " * 10 + "internationalisation" * 2000,
    "just above": "word " * (2 * HEAD // 5 + 1),
}


class Watched:
    """A tokenizer that notes how much it is given at a time."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.given = []

    def __call__(self, texts, **options):
        self.given.append(len(texts) if isinstance(texts, str) else sum(map(len, texts)))
        return self._tokenizer(texts, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.fixture(scope="module")
def tokenizer(minilm):
    """The real model's."""
    return transformers.AutoTokenizer.from_pretrained(minilm)


def tokens_of(tokenizer, texts):
    """Return the tokens of each text as they go through the model, without padding."""
    found = {}
    for rows, batch in tokenize(tokenizer, texts, LIMITS, 0.0):
        for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            found[row] = ids[mask.bool()].tolist()
    return [found[row] for row in range(len(texts))]


@pytest.mark.parametrize("kind", LONG)
def test_what_is_cut_is_cut_as_if_the_whole_had_been_read(tokenizer, kind):
    """Tokens of a long text, alone and beside short ones, are the first ones of all that it has."""
    texts = ["short", LONG[kind], "of some words"]
    expected = [
        tokenizer(text, truncation=True, max_length=LIMITS.max_tokens)["input_ids"]
        for text in texts
    ]
    assert tokens_of(tokenizer, texts) == expected
    assert tokens_of(tokenizer, texts[1:2]) == expected[1:2]


def test_of_a_long_text_the_beginning_is_read(tokenizer):
    """Of a text of a million characters the tokenizer is given the few that its tokens are in."""
    watched = Watched(tokenizer)
    tokens_of(watched, ["several words " * 70_000])
    assert watched.given == [HEAD]


def test_what_is_read_at_once_is_bounded(tokenizer):
    """Texts that have to be read whole go a few at a time, so that a worker that has many of them is not taken for hung."""
    watched = Watched(tokenizer)
    tokens_of(watched, [" " * (CHUNK_CHARACTERS // 2 - number) for number in range(5)])
    assert max(watched.given) <= CHUNK_CHARACTERS


def test_a_prompt_far_above_the_context_is_not_read_to_its_end(tokenizer):
    """How many tokens it has is not found out; one that is long and has few is read whole."""
    watched = Watched(tokenizer)
    tokens, whole = read_tokens(watched, "several words " * 70_000, 16, special=True)
    assert (len(tokens) > 16, whole) == (True, False)
    assert watched.given == [16 * HEAD_CHARACTERS]
    blanks = " " * 3000 + "word"
    assert read_tokens(tokenizer, blanks, 16, special=True) == (
        tokenizer(blanks)["input_ids"],
        True,
    )
