"""Prompts that wait together: they go through the model in one pass, as far as those at work can wait for it."""

import weakref

import pytest
import torch

from modelhostd.worker.backends.generation import lanes
from modelhostd.worker.backends.generation.slab import SPARE_TOKENS, Slab
from tests.worker.generation_models import (
    CONFIGS,
    CONTEXT,
    PROMPTS,
    begin,
    expected,
    load,
    run,
    save_model,
)

pytestmark = pytest.mark.timeout(900)
"""The first one imports a library for seconds, which on a swamped machine is more than a minute."""


@pytest.fixture
def backend(llama):
    """A backend with a text at work, so that it knows that its model's texts can share passes."""
    made = load(llama)
    made.first = begin(made, "hello", max_tokens=80, ignore_eos=True)
    made.step()
    yield made
    made.unload()


@pytest.fixture
def passes(backend, monkeypatch):
    """Rows and tokens of each pass of the model."""
    made = []
    model = backend._model
    forward = model.forward

    def note(input_ids, **more):
        made.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "forward", note)
    return made


@pytest.mark.parametrize("kind", CONFIGS)
def test_prompts_begun_together_write_what_each_does_alone(kind, tmp_path):
    """Each text is the library's, however long the prompts beside it are."""
    model = save_model(tmp_path, kind)
    backend = load(tmp_path, max_sequence_length=CONTEXT)
    begin(backend, "first", max_tokens=2)
    run(backend)
    readers = [begin(backend, prompt, max_tokens=20) for prompt in PROMPTS]
    run(backend)
    for prompt, reader in zip(PROMPTS, readers, strict=True):
        assert (reader.text, reader.error) == (expected(model, tmp_path, prompt, 20)[0], None)
    backend.unload()


def counts(backend):
    """Return how many tokens each text at work has; some make no character yet."""
    return [len(generation.tokens) for generation in backend._engine._running]


def test_all_that_wait_have_their_first_token_after_one_step(backend, passes):
    """A step is a token for who is at work, and one pass for all short prompts that wait."""
    for prompt in PROMPTS:
        begin(backend, prompt, max_tokens=9, ignore_eos=True)
    backend.step()
    assert counts(backend) == [2] + [1] * len(PROMPTS)
    assert passes == [(1, 1), (len(PROMPTS), max(map(len, PROMPTS)))]


def test_who_reads_waits_for_so_many_tokens_of_prompts(backend, passes, monkeypatch):
    """Prompts of more than one pass takes, padded to the longest, come between several tokens, in their order."""
    monkeypatch.setattr(lanes, "PROMPT_TOKENS", 16)
    for prompt in "abcdefgh":
        begin(backend, prompt * 5, max_tokens=9, ignore_eos=True)
    for _ in range(3):
        backend.step()
    assert counts(backend) == [4, 3, 3, 3, 2, 2, 2, 1, 1]
    assert passes == [(1, 1), (3, 5), (4, 1), (3, 5), (7, 1), (2, 5)]


def test_no_prompt_is_padded_for_more_than_a_pass_costs(backend, passes, monkeypatch):
    """A short prompt beside a long one goes through the model by itself."""
    monkeypatch.setattr(backend._engine._lane, "_price", 10)
    readers = [begin(backend, "x" * length, max_tokens=9, ignore_eos=True) for length in (20, 9)]
    run(backend)
    assert passes[:4] == [(1, 1), (1, 20), (2, 1), (1, 9)]
    assert all(reader.ended for reader in readers)


def test_a_prompt_that_makes_the_model_fail_fails_alone(backend, passes, monkeypatch):
    """What fails together is run one by one, without what was computed then, and whose fault it is learns of it."""
    alone = begin(backend, "good", max_tokens=9, ignore_eos=True)
    run(backend)
    forward, left = backend._model.forward, []

    def fail(input_ids, **more):
        assert not left or left[0]() is None
        if (input_ids == ord("!") - 33).any() and input_ids.shape[1] > 1:
            computed = torch.zeros(1)
            left.append(weakref.ref(computed))
            raise MemoryError
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(backend._model, "forward", fail)
    readers = [
        begin(backend, prompt, max_tokens=9, ignore_eos=True) for prompt in ("good", "!!", "good")
    ]
    run(backend)
    assert len(left) == 2
    assert [type(reader.error) for reader in readers] == [type(None), MemoryError, type(None)]
    assert readers[0].text == readers[2].text == alone.text


def test_memory_is_taken_ahead_no_further_than_is_reserved():
    """Room for rows and tokens to come ends at the bound, unless those that are there need more."""
    slab = Slab(most_tokens=200)

    def row(length):
        return [(torch.full((1, 2, length, 4), float(length)), torch.zeros(1, 2, length, 4))]

    slab.add(row(10))
    (layer,) = slab.cache.layers
    assert layer.room_keys.shape[::2] == (1, 10 + SPARE_TOKENS)
    for length in (30, 20):
        slab.add(row(length))
    (layer,) = slab.cache.layers
    assert layer.room_keys.shape[0] * layer.room_keys.shape[2] <= 200
    assert layer.keys.shape == (3, 2, 30, 4)
    for place, length in enumerate((10, 30, 20)):
        assert (layer.keys[place, :, -length:] == length).all()
        assert (layer.keys[place, :, :-length] != length).all()
    slab.remove(1, longest=20)
    assert layer.keys.shape == (2, 2, 20, 4)
    assert [float(one) for one in layer.keys[:, 0, -1, 0]] == [10, 20]
    slab.add(row(150))
    assert slab.width == 150
