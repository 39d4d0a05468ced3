"""Reads tokenizers, and keeps those of models that left for when they come back.

Reading one holds the interpreter, and with it every request of the worker: the library makes its tables in one call, 10 ms
for 30,000 words and half a second for 128,000. It cannot be told to let others run. So a tokenizer outlives its model, within limits,
and files of the same contents are read once. What the library does before, reading JSON, it does here in a way that others can run.
"""

import hashlib
import json
import os
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from modelhostd.core.values import dataclass
from modelhostd.worker.process import drops_when_short, importing

MAX_TOKENIZERS = 32
MAX_BYTES = 256 * 2**20
MEMORY_SHARE = 64
"""All that are kept take at most one part in so many of the machine's memory, and ``MAX_BYTES``: a container has less than its machine."""
WORD_BYTES = {"WordPiece": 400, "WordLevel": 400, "BPE": 800, "Unigram": 1300}
"""Of memory, for each word: 10 MB for 30,522 of WordPiece, 308 MB for 250,000 of Unigram, 44 MB for 128,000 of BPE, and as
much again where the library keeps words and merges in Python, too."""
MAX_FILE_BYTES = 128 * 2**20
"""Of the files that say what a tokenizer is; beside more than that none is kept."""

_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Taken:
    """A tokenizer in the hands of one model: it remembers how it was last called, so two cannot share it."""

    tokenizer: Any
    digest: bytes
    """Of the files that it was made of; empty = it is not kept."""
    size: int
    """Bytes of memory, estimated."""


class Shelf:
    """The tokenizers of models that have left, the one that came last goes last. Any thread."""

    def __init__(
        self,
        read: Callable[[Path], Any],
        measure: Callable[[Any], int],
        max_bytes: int,
        most: int = MAX_TOKENIZERS,
    ) -> None:
        """Keep nothing yet. ``read`` makes a tokenizer of a folder; ``measure`` tells its bytes of memory."""
        self._read = read
        self._measure = measure
        self._max_bytes = max_bytes
        self._most = most
        self._lock = threading.Lock()
        self._kept: dict[bytes, Taken] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that are kept, estimated."""
        with self._lock:
            return sum(taken.size for taken in self._kept.values())

    def take(self, model_dir: Path) -> Taken:
        """Return the tokenizer of a model: one that was given back, or read now. Raises what the library raises."""
        digest = _identify(model_dir)
        with self._lock:
            kept = self._kept.pop(digest, None)
        if kept is not None:
            return kept
        tokenizer = self._read(model_dir)
        return Taken(tokenizer, digest, self._measure(tokenizer))

    def give_back(self, taken: Taken) -> None:
        """Take a tokenizer whose model has left; nobody may use it any more."""
        if not taken.digest or taken.size > self._max_bytes:
            return
        gone = []
        with self._lock:
            gone.append(self._kept.pop(taken.digest, None))
            self._kept[taken.digest] = taken
            total = sum(kept.size for kept in self._kept.values())
            while total > self._max_bytes or len(self._kept) > self._most:
                first = self._kept.pop(next(iter(self._kept)))
                total -= first.size
                gone.append(first)
        # Freed here, without the lock: a large one takes as long as several requests.
        del gone

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            gone, self._kept = self._kept, {}
        del gone


def read_tokenizer(model_dir: Path) -> Any:
    """Return what the library makes of a model's files, without code of the model's own. Raises what it raises."""
    import transformers

    _let_others_run()
    # A class of its own may be imported; and merges are lists, which the collector would look at again and again.
    return importing(
        lambda: transformers.AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    )


def memory_of(tokenizer: Any) -> int:
    """Return about how many bytes of memory a tokenizer takes."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return len(tokenizer) * WORD_BYTES.get(type(model).__name__, max(WORD_BYTES.values()))


def _identify(model_dir: Path) -> bytes:
    """Return a digest of all files but weights; empty where these are too many bytes.

    Of all: which ones the library reads, and which of its classes it takes, is its own affair.
    """
    digest = hashlib.sha256()
    total = 0
    for path in sorted(model_dir.rglob("*")):
        if path.suffix == _WEIGHTS or not path.is_file():
            continue
        total += path.stat().st_size
        if total > MAX_FILE_BYTES:
            return b""
        name = os.fsencode(path.relative_to(model_dir))
        # Hashing lets others run.
        digest.update(hashlib.sha256(name).digest() + hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def _let_others_run() -> None:
    """Have the library read JSON with functions of Python's for its numbers: between two of them another thread can run.

    Else 0.5 MB are one step of 7 ms. Texts and what is in them stay as they are.
    """
    from transformers import tokenization_utils_base, tokenization_utils_tokenizers

    for module in (tokenization_utils_base, tokenization_utils_tokenizers):
        cast(Any, module).json = _JSON


def _load(file: Any, **options: Any) -> Any:
    return json.load(file, **{"parse_int": _whole, "parse_float": _real, **options})


def _whole(digits: str) -> int:
    return int(digits)


def _real(digits: str) -> float:
    return float(digits)


_JSON = types.SimpleNamespace(**{**vars(json), "load": _load})

SHELF = Shelf(
    read_tokenizer,
    memory_of,
    min(MAX_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEMORY_SHARE),
)
"""Of this worker."""
drops_when_short(SHELF.clear)
