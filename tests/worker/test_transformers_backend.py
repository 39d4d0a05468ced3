"""The transformers backend gives what the bare library gives."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Health, ModelConfig, Phase
from modelhostd.ports import LoadSpec
from modelhostd.worker.backend import (
    Cancelled,
    InferContext,
    Tensor,
    UnsupportedModelError,
)
from modelhostd.worker.backends.text import TextLimits, tokenize
from tests.worker.bert import CLASSIFICATION, EMBEDDING, ask, byte_strings, load
from tests.worker.harness import CONFIG, decode, encode, running

pytestmark = pytest.mark.timeout(900)
"""The first one, and the worker's, import a library for seconds, which on a swamped machine is more than a minute."""

TEXTS = [
    "A cat sits on the mat.",
    "Embeddings",
    "The stock market fell sharply today, analysts said.",
]


def reference(folder, texts, max_length=256):
    """Embed by the bare library: mean pooling over the mask, normalised."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    pooled = (tokens * mask).sum(1) / mask.sum(1)
    return batch, torch.nn.functional.normalize(pooled, dim=1).numpy(), pooled.numpy()


def test_embeddings_of_the_real_model_equal_the_bare_librarys(minilm):
    """Texts, few and many, embed as transformers with mean pooling and normalisation, to 1e-5."""
    backend = load(minilm)
    texts = [f"{text} {'really ' * (number % 7)}" for number, text in enumerate(TEXTS * 25)]
    embedded = ask(backend, texts)["embedding"]
    _, expected, _ = reference(minilm, texts)
    assert (embedded.dtype, embedded.shape) == (np.float32, (75, 384))
    assert np.abs(embedded - expected).max() < 1e-5
    assert backend.health_check().ok


def test_a_long_text_is_cut_where_the_model_says(minilm):
    """Text beyond the 256 tokens of this model's own file changes nothing; a lower limit cuts sooner. Both are told."""
    text = "word " * 254
    backend = load(minilm)
    whole, longer = ask(backend, [text, text + "and much more of it"])["embedding"]
    assert np.abs(whole - longer).max() < 1e-5
    assert "cut to 256 tokens" in backend.signature().inputs[0].description
    short = load(minilm, max_sequence_length=8)
    assert "cut to 8 tokens" in short.signature().inputs[0].description
    _, expected, _ = reference(minilm, TEXTS, max_length=8)
    assert np.abs(ask(short, TEXTS)["embedding"] - expected).max() < 1e-5


def test_measured_bytes_are_the_weights_to_the_byte(minilm):
    """What an instance holds is its parameters once and its buffers, and nothing after an unload."""
    backend = load(minilm)
    file_bytes = sum(t.nbytes for t in load_file(minilm / "model.safetensors").values())
    pool_and_ids = sum(b.nbytes for n, b in backend.torch_module().named_buffers())
    assert file_bytes <= backend.measured_bytes <= file_bytes + pool_and_ids
    backend.unload()
    assert backend.measured_bytes == 0
    backend.unload()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 1e-2)])
def test_half_precision_halves_the_bytes(tiny, precision, tolerance):
    """A precision is what the weights are held in; answers stay FP32 and near."""
    full, half = load(tiny), load(tiny, precision=precision)
    assert half.measured_bytes < 0.6 * full.measured_bytes
    answers = [ask(backend, ["the cat sits", "a mat ."])["embedding"] for backend in (full, half)]
    assert answers[1].dtype == np.float32
    assert np.abs(answers[0] - answers[1]).max() < tolerance * 10


def test_a_language_model_that_embeds_keeps_nothing_of_a_pass(llama):
    """Keys and values of all tokens in each layer are not held; the tokens' embeddings are the same without."""
    model = load(llama).torch_module()
    ids = torch.arange(6).reshape(2, 3)
    with torch.inference_mode():
        found, kept = model(input_ids=ids), model(input_ids=ids, use_cache=True)
    assert (found.past_key_values is None, kept.past_key_values is None) == (True, False)
    assert torch.equal(found.last_hidden_state, kept.last_hidden_state)


def test_token_tensors_are_the_alternative_to_text(minilm):
    """Ids and mask from the model's tokenizer give the same embedding as the text."""
    backend = load(minilm)
    batch, expected, _ = reference(minilm, TEXTS)
    inputs = {name: Tensor("INT64", values.numpy()) for name, values in batch.items()}
    assert np.abs(backend.infer(inputs, InferContext())["embedding"] - expected).max() < 1e-5
    del inputs["token_type_ids"]
    assert np.abs(backend.infer(inputs, InferContext())["embedding"] - expected).max() < 1e-5


def test_a_model_without_a_recipe_is_pooled_by_the_mean(tiny):
    """Plain transformers files give the mean of the tokens, not normalised, unless options say so."""
    texts = ["the cat", "a mat on the cat ."]
    _, normalised, mean = reference(tiny, texts, max_length=24)
    assert np.abs(ask(load(tiny), texts)["embedding"] - mean).max() < 1e-5
    backend = load(tiny, options={"normalize": True})
    assert np.abs(ask(backend, texts)["embedding"] - normalised).max() < 1e-5


@pytest.mark.parametrize(
    "pooling", ["cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
)
def test_each_pooling_is_what_its_name_says(tiny, pooling, tmp_path):
    """Each way of pooling, named by a sentence-transformers layout, equals its plain definition."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    key = {"cls": "cls_token", "max": "max_tokens", "weightedmean": "weightedmean_tokens"}.get(
        pooling, pooling
    )
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{key}": True}))
    text = "a cat sits on the mat ."
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.AutoModel.from_pretrained(tiny).eval()
    with torch.no_grad():
        tokens = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
    weights = torch.arange(1, len(tokens) + 1).float()
    expected = {
        "cls": tokens[0],
        "lasttoken": tokens[-1],
        "max": tokens.max(0).values,
        "mean_sqrt_len_tokens": tokens.sum(0) / len(tokens) ** 0.5,
        "weightedmean": (tokens * weights[:, None]).sum(0) / weights.sum(),
    }[pooling].numpy()
    # Padding beside it must not count.
    answer = ask(load(tmp_path), [text, "the cat " * 8])["embedding"]
    assert np.abs(answer[0] - expected).max() < 1e-5


def test_a_pooling_whose_file_is_absent_is_told_by_that_file(tiny, tmp_path):
    """A folder that was copied without its folders is refused with the one that is missing."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    modules = [{"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match="'1_Pooling', whose config"):
        load(tmp_path)


def test_classification_equals_the_bare_library(classifier):
    """Scores, labels and logits are those of the model itself, for one text and for many."""
    texts = ["the cat sits", "a mat .", "on the mat a cat sits ."] * 20
    backend = load(classifier, CLASSIFICATION)
    answer = ask(backend, texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert np.abs(answer["logits"] - logits.numpy()).max() < 1e-5
    assert np.abs(answer["scores"] - logits.softmax(-1).numpy()).max() < 1e-5
    names = [model.config.id2label[int(index)].encode() for index in logits.argmax(-1)]
    assert answer["label"].tolist() == names
    assert [spec.name for spec in backend.signature().outputs] == ["scores", "label", "logits"]


def test_work_stops_between_batches(tiny):
    """A cancelled request of many texts ends at the next batch."""
    passes = iter([False, False, True])
    context = InferContext(cancelled=lambda: next(passes))
    with pytest.raises(Cancelled):
        load(tiny).infer({"text": byte_strings(["a cat"] * 200)}, context)
    assert next(passes, None) is None


def test_sharded_weights_are_read_whole(tiny, tmp_path):
    """A model in several files with an index answers as in one."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    model = transformers.AutoModel.from_pretrained(tiny)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    texts = ["the cat sits"]
    one, many = (ask(load(folder), texts)["embedding"] for folder in (tiny, tmp_path))
    assert np.array_equal(one, many)


def test_progress_of_a_load_rises_to_the_files_size(tiny):
    """Bytes are reported as they are read, never falling, up to the whole; cancelling stops it."""
    seen = []
    load(tiny, report=lambda done, total: seen.append((done, total)))
    size = (tiny / "model.safetensors").stat().st_size
    assert {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size)
    with pytest.raises(Cancelled):
        load(tiny, cancelled=lambda: True)


def test_a_canary_that_changes_is_unhealthy(tiny):
    """The health check notices weights that are no longer what they were, and numbers that are none."""
    backend = load(tiny)
    assert backend.health_check().ok
    weight = next(backend.torch_module().parameters())
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    assert not backend.health_check().ok
    with torch.no_grad():
        weight.fill_(float("nan"))
    assert "finite" in backend.health_check().message


async def test_a_worker_serves_the_model_end_to_end(tiny, classifier):
    """Through the worker process: loads with progress, checks, embeddings, classes, refusals, unload."""
    config = dataclasses.replace(
        CONFIG, backends=("transformers", "identity"), start_timeout_s=120.0
    )
    async with running(config) as (workers, _):
        seen = []
        embed = LoadSpec("e", "e-1", 1, 1, tiny, EMBEDDING, ModelConfig(), 0)
        loaded = await workers.load("cpu", embed, seen.append)
        assert (loaded.backend, loaded.platform) == ("transformers", "pytorch_transformers")
        # What is read beside the files (the pooler, positions) begins at alignments of its own.
        assert 0 <= loaded.measured_bytes - load(tiny).measured_bytes < 4 * 512
        assert [report.phase for report in seen][-1] is Phase.CHECKING
        classify = LoadSpec("c", "c-1", 1, 1, classifier, CLASSIFICATION, ModelConfig(), 0)
        await workers.load("cpu", classify, seen.append)
        assert {"torch", "transformers"} <= workers.libraries("cpu").keys()
        for shape in ((2,), (2, 1)):
            texts = byte_strings(["the cat", "a mat"])
            tensor = Tensor("BYTES", texts.array.reshape(shape))
            payload = encode({"text": tensor}, name="e")
            reply = await workers.infer("cpu", "e-1", 1, payload, timeout_s=None)
            _, arrays = decode(reply.payload)
            expected = ask(load(tiny), ["the cat", "a mat"])["embedding"]
            assert np.abs(arrays["embedding"] - expected).max() < 1e-5
            assert reply.item_count == 2
        payload = encode({"text": byte_strings(["the cat"])}, name="c", outputs=["label"])
        reply = await workers.infer("cpu", "c-1", 1, payload, timeout_s=None)
        response, _ = decode(reply.payload)
        assert [output.name for output in response.outputs] == ["label"]
        bad = encode({"text": np.zeros(2, np.float32)}, name="e")
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "e-1", 1, bad, timeout_s=None)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert (await workers.check("cpu", "e-1", 1))[0] is Health.HEALTHY
        await workers.unload("cpu", "e-1", 1)
        await workers.unload("cpu", "c-1", 1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_go_through_the_model_with_their_like(minilm, side):
    """Of short and long texts each pass is as wide as its longest, whichever side is padded; none is lost or changed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm, padding_side=side)
    limits = TextLimits(256, 512, len(tokenizer), 2)
    texts = ["word " * count for count in (40, 1, 38, 2, 1, 0, 40)]
    found = {}
    widths = []
    for rows, batch in tokenize(tokenizer, texts, limits, price=20):
        assert batch["attention_mask"].any(0).all()
        widths.append(batch["input_ids"].shape[1])
        for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            found[row] = ids[mask.bool()].tolist()
    assert found == {row: tokenizer(text)["input_ids"] for row, text in enumerate(texts)}
    assert widths == [4, 42]
