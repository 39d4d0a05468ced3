"""What models answer to requests that run together is what they answer to each alone."""

import numpy as np
import pytest

from modelhostd.worker.backend import InferContext, Tensor
from modelhostd.worker.backends.identity import IdentityBackend
from modelhostd.worker.batches import split
from tests.worker.bert import CLASSIFICATION, byte_strings, load

pytestmark = pytest.mark.timeout(900)
"""The first one imports a library for seconds, which on a swamped machine is more than a minute."""

TOLERANCE = 2e-6
"""FP32, absolute, for embeddings of length 1 and probabilities: rounding in another order, and no more."""

TEXTS = (
    ["The cat sits on the mat."],
    ["a cat", "on the mat the cat sits . the mat the cat", "mat"],
    [""],
    ["the " * 30],
)


def tokens(*lengths, types=False):
    """Return token tensors whose items have these lengths, padded to the longest."""
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = np.random.default_rng(length).integers(5, 12, length)
        mask[row, :length] = 1
    made = {"input_ids": Tensor("INT64", ids), "attention_mask": Tensor("INT64", mask)}
    if types:
        made["token_type_ids"] = Tensor("INT64", np.zeros_like(ids))
    return made


def together(backend, requests):
    """Return the answers of one execution to all requests."""
    assert len({backend.alike(request)[0] for request in requests}) == 1
    counts = [len(next(iter(request.values())).array) for request in requests]
    return split(backend.infer(backend.join(requests), InferContext()), counts)


def assert_same(backend, requests):
    """Compare the answers of one execution with those of one for each request."""
    for request, got in zip(requests, together(backend, requests), strict=True):
        alone = backend.infer(request, InferContext())
        assert got.keys() == alone.keys()
        for name, want in alone.items():
            array = got[name].array
            assert array.shape == want.shape
            if array.dtype == object:
                assert array.tolist() == want.tolist()
            else:
                assert np.abs(array - want).max() <= TOLERANCE, name


def test_embeddings_of_the_real_model(minilm):
    """Sentences of several requests, long and short, embed as they do alone."""
    backend = load(minilm)
    assert backend.signature().joinable
    assert_same(backend, [{"text": byte_strings(texts)} for texts in TEXTS])


def test_token_tensors_are_padded_and_masked(tiny):
    """Requests whose token tensors have other lengths are padded, which changes no answer."""
    backend = load(tiny)
    assert_same(backend, [tokens(5), tokens(3, 9, 1), tokens(17)])
    assert_same(backend, [tokens(5, types=True), tokens(8, 2, types=True)])


def test_classes(classifier):
    """Scores, logits and labels are the same."""
    assert_same(load(classifier, CLASSIFICATION), [{"text": byte_strings(t)} for t in TEXTS])


def test_texts_and_tokens_are_not_alike(tiny):
    """They are different inputs, and so are token tensors with and without types."""
    backend = load(tiny)
    requests = [{"text": byte_strings(["a"])}, tokens(3), tokens(3, types=True)]
    assert len({backend.alike(request)[0] for request in requests}) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.int8, object])
def test_identity(dtype):
    """The identity backend gives each request its own back, whatever the type."""
    backend = IdentityBackend()
    name = "BYTES" if dtype is object else "FP32"
    requests = [{"x": Tensor(name, np.array([[n], [n + 1]], dtype))} for n in range(3)]
    for request, got in zip(requests, together(backend, requests), strict=True):
        assert got["x"].array.tolist() == request["x"].array.tolist()


def test_outputs_that_are_not_one_per_item_are_a_bug():
    """What cannot be told apart is not guessed."""
    with pytest.raises(ValueError, match="not one of 3 items"):
        split({"y": np.zeros((2, 2), np.float32)}, [1, 2])


@pytest.mark.slow
@pytest.mark.timeout(5400)
# torch's own compiler imports what torch calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_model_answers_the_same(tiny):
    """What torch compiled while the model was loaded answers as the model does; it is not moved between tiers."""
    plain, made = load(tiny), load(tiny, options={"compile": True})
    assert made.torch_module() is None
    for texts in TEXTS:
        want = plain.infer({"text": byte_strings(texts)}, InferContext())["embedding"]
        got = made.infer({"text": byte_strings(texts)}, InferContext())["embedding"]
        assert np.abs(got - want).max() <= 1e-5
