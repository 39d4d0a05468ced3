"""The manifest beside an artifact's files: what is there, and enough to rebuild a lost registry row.

JSON, one object, keys sorted, format 1. ``entry`` is what the host gave with the download job (display
name, labels, task, licence, config ...): kept as it came, read back by the host alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.names import ID
from modelhostd.core.paths import check_tree
from modelhostd.core.resources import ModelFile, Source
from modelhostd.core.values import dataclass

FORMAT = 1
MANIFEST_BYTES_MAX = 64 << 20
FILES_MAX = 100_000
ENTRY_BYTES_MAX = 1 << 20
TEXT_CHARS_MAX = 4096
VERSION_MAX = (1 << 31) - 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One artifact as it is on disk. ``create_time`` is seconds since the epoch."""

    model: str
    version: int
    source: Source
    revision: str
    files: tuple[ModelFile, ...]
    predicted_bytes: int = 0
    create_time: float = 0.0
    source_task: str = ""
    """The source's own word (``pipeline_tag``), from which a rebuilt entry has its task."""
    licence: str = ""
    tags: tuple[str, ...] = ()
    entry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files)


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as JSON; raises STORAGE_ERROR when it is out of the bounds of ``decode``."""
    entry = json.dumps(manifest.entry, sort_keys=True, allow_nan=False)
    if len(entry) > ENTRY_BYTES_MAX or len(manifest.files) > FILES_MAX:
        raise _broken(f"{manifest.model}/{manifest.version}", "it is too large to write")
    document = {
        "format": FORMAT,
        "model": manifest.model,
        "version": manifest.version,
        "source": {
            "uri": manifest.source.uri,
            "revision": manifest.source.revision,
            "allow_patterns": list(manifest.source.allow_patterns),
            "ignore_patterns": list(manifest.source.ignore_patterns),
            "more_uris": list(manifest.source.more_uris),
        },
        "revision": manifest.revision,
        "predicted_bytes": manifest.predicted_bytes,
        "create_time": manifest.create_time,
        "source_task": manifest.source_task,
        "licence": manifest.licence,
        "tags": list(manifest.tags),
        "entry": dict(manifest.entry),
        "files": [
            {"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256}
            for file in sorted(manifest.files, key=lambda file: file.path)
        ],
    }
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False).encode()


def decode(data: bytes, name: str) -> Manifest:
    """Return the manifest in ``data``; ``name`` (``minilm/1``) is for the message.

    Raises STORAGE_ERROR for anything that ``encode`` does not write, unknown keys excepted: a newer
    daemon of the same format may add some.
    """
    if len(data) > MANIFEST_BYTES_MAX:
        raise _broken(name, f"{len(data)} bytes, at most {MANIFEST_BYTES_MAX}")
    try:
        document = json.loads(data)
        if document["format"] != FORMAT:
            raise _broken(name, f"format {document['format']!r}, this daemon reads {FORMAT}")
        return _decode(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(name, f"{type(error).__name__}: {str(error)[:200]}") from None


def _decode(document: Mapping[str, Any]) -> Manifest:
    source, entry = document["source"], document["entry"]
    if not isinstance(document["files"], list) or len(document["files"]) > FILES_MAX:
        raise TypeError(f"expected a list of up to {FILES_MAX} files")
    if not isinstance(entry, dict):
        raise TypeError("entry is not an object")
    files = tuple(
        ModelFile(_text(f["path"]), _count(f["size_bytes"]), _digest(f["sha256"]))
        for f in document["files"]
    )
    model = _text(document["model"])
    if ID.fullmatch(model) is None:
        raise ValueError(f"model {model[:80]!r} is no id")
    try:
        check_tree(file.path for file in files)
    except ModelhostError as error:
        raise ValueError(error.message) from None
    return Manifest(
        model=model,
        version=_count(document["version"], at_least=1, at_most=VERSION_MAX),
        source=Source(
            uri=_text(source["uri"]),
            revision=_text(source["revision"]),
            allow_patterns=_texts(source["allow_patterns"]),
            ignore_patterns=_texts(source["ignore_patterns"]),
            more_uris=_texts(source.get("more_uris", [])),
        ),
        revision=_text(document["revision"]),
        files=files,
        predicted_bytes=_count(document["predicted_bytes"]),
        create_time=_seconds(document["create_time"]),
        source_task=_text(document["source_task"]),
        licence=_text(document["licence"]),
        tags=_texts(document["tags"]),
        entry=entry,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX:
        raise TypeError(f"expected a text of up to {TEXT_CHARS_MAX} characters")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > FILES_MAX:
        raise TypeError("expected a list of texts")
    items: Sequence[Any] = value
    return tuple(_text(item) for item in items)


def _count(value: Any, *, at_least: int = 0, at_most: int = (1 << 63) - 1) -> int:
    if type(value) is not int or not at_least <= value <= at_most:
        raise TypeError(f"expected a whole number of {at_least} to {at_most}")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in {int, float} or not 0 <= value < 1e12:
        raise TypeError("expected seconds since the epoch")
    return float(value)


def _digest(value: Any) -> str:
    if not isinstance(value, str) or _SHA256.fullmatch(value) is None:
        raise TypeError("expected a SHA-256 in hexadecimal")
    return value


def _broken(name: str, cause: str) -> ModelhostError:
    return ModelhostError(
        Reason.STORAGE_ERROR,
        f"the manifest of {name} cannot be used: {cause}; download the model again",
        {"path": name, "cause": cause},
    )
