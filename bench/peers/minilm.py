"""all-MiniLM-L6-v2 as one writes it with the bare library: the model of the peers, and of the bare loop.

Runs in the environments of the peers too, so it imports nothing of the project.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_TOKENS = 256


class MiniLM:
    """Texts to embeddings: mean pooling over the tokens, normalised. OMP_NUM_THREADS says how many threads."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        quiet: Any = transformers.utils.logging
        quiet.disable_progress_bar()
        own = {"local_files_only": True}
        self._torch = torch
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **own)
        self._model = transformers.AutoModel.from_pretrained(folder, **own).eval()

    def embed(self, texts: Sequence[str]) -> Any:
        """Return (n, 384) float32 embeddings."""
        torch = self._torch
        batch = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(pooled, dim=1).numpy()
