"""Which tokens may be drawn, and how likely: what the library's own classes say."""

import hypothesis.strategies as st
import pytest
import torch
import transformers.generation.logits_process as library
from hypothesis import given

from modelhostd.worker.backends.generation.parameters import Parameters
from modelhostd.worker.backends.generation.sampling import NUCLEUS, Sampler, choices

CPU = torch.device("cpu")


def as_the_library(scores, top_k, top_p, min_p):
    """Return the chances of all tokens as the library has them."""
    row = scores.unsqueeze(0)
    if top_k > 0:
        row = library.TopKLogitsWarper(top_k)(None, row)
    if top_p < 1:
        row = library.TopPLogitsWarper(top_p)(None, row)
    if min_p > 0:
        row = library.MinPLogitsWarper(min_p)(None, row)
    return row[0].softmax(-1)


@given(
    seed=st.integers(0, 2**32),
    count=st.sampled_from((3, NUCLEUS, 4 * NUCLEUS)),
    spread=st.sampled_from((0.1, 1.0, 6.0)),
    top_k=st.sampled_from((0, 1, 2, 50, 10**6)),
    top_p=st.sampled_from((1e-6, 0.3, 0.9, 0.999, 1.0)),
    min_p=st.sampled_from((0.0, 0.01, 0.5, 1.0)),
)
def test_chances_are_the_librarys(seed, count, spread, top_k, top_p, min_p):
    """Whatever is asked together, the same tokens remain with the same chances."""
    scores = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * spread
    want = as_the_library(scores, top_k, top_p, min_p)
    kept, tokens = choices(scores.softmax(-1), top_k, top_p, min_p)
    got = torch.zeros(count)
    got[torch.arange(count) if tokens is None else tokens] = kept / kept.sum()
    # At the edge of the nucleus rounding may decide, over one token.
    differ = (got - want).abs() > 1e-5 + 1e-3 * want
    edge = int(((got > 0) != (want > 0)).sum())
    assert edge == 1 or not bool(differ.any())


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_the_librarys(penalty):
    """Tokens of the prompt and of the text so far are less (or more) likely, by the library's rule."""
    random = torch.Generator().manual_seed(3)
    before = [1, 5, 5, 9]
    sampler = Sampler(Parameters(repetition_penalty=penalty), before, CPU)
    for _ in range(20):
        scores = torch.randn(12, generator=random)
        rule = library.RepetitionPenaltyLogitsProcessor(penalty)
        want = int(rule(torch.tensor([before]), scores.unsqueeze(0)).argmax())
        assert sampler.pick(scores) == want
        before = [*before, want]


def test_draws_are_as_frequent_as_they_are_likely():
    """Of 20,000 draws each token has its share, and one without a chance has none."""
    scores = torch.log(torch.tensor([0.5, 0.0, 0.3, 0.2]))
    sampler = Sampler(Parameters(temperature=1.0, seed=1), [], CPU)
    drawn = torch.bincount(torch.tensor([sampler.pick(scores) for _ in range(20_000)]), minlength=4)
    assert drawn[1] == 0
    assert torch.allclose(drawn / 20_000, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.02)


def test_scores_that_are_not_numbers_are_an_error():
    """A broken model's text ends with an error, not with tokens of no meaning."""
    sampler = Sampler(Parameters(temperature=1.0), [], CPU)
    with pytest.raises(ValueError, match="not numbers"):
        sampler.pick(torch.tensor([0.0, float("nan")]))
