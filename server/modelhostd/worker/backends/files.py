"""Reads a model's own files: configuration with bounds, weights with progress in bytes.

Nothing here runs code that came with a model, and a model that asks for that is refused.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from modelhostd.core.errors import ModelhostError
from modelhostd.core.safetensors_header import (
    PREFIX_BYTES,
    Header,
    TensorEntry,
    header_length,
    parse_header,
)
from modelhostd.worker.backend import LoadContext, LoadError, UnsupportedModelError
from modelhostd.worker.image.descriptions import describe
from modelhostd.worker.image.reading import Plan, Stored

MAX_JSON_BYTES = 16 * 2**20

CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})
"""Keys by which a configuration has a library import Python files that lie beside it."""
_LARGE = frozenset({"tokenizer.json", "vocab.json"})

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_json(model_dir: Path, name: str) -> Any:
    """Return a file's JSON; None where the file is not there. Raises :class:`LoadError` with its name."""
    path = model_dir / name
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise LoadError(f"{name} is larger than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{name} is not valid JSON: {error}") from error


def read_object(model_dir: Path, name: str) -> Mapping[str, Any]:
    """Return a file's JSON object; empty where the file is not there."""
    found = read_json(model_dir, name)
    if found is not None and not isinstance(found, dict):
        raise LoadError(f"{name} holds no JSON object")
    return found or {}


def refuse_custom_code(model_dir: Path) -> None:
    """Raise :class:`UnsupportedModelError` where a configuration asks for code of the model's own."""
    for path in sorted(model_dir.rglob("*.json")):
        name = path.relative_to(model_dir).as_posix()
        if path.name in _LARGE or name.endswith(".index.json"):
            continue
        keys = CODE_KEYS.intersection(_keys(read_json(model_dir, name)))
        if keys:
            raise UnsupportedModelError(
                f"{name} has '{min(keys)}': the model needs Python code of its own, which is never run"
            )


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def read_weights(context: LoadContext, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Read all safetensors of a model, floats as ``dtype``, into memory of the worker's image where there is one.

    Reading, not mapping: what is mapped could change under the model, and counts as nobody's memory. What an earlier
    worker read and left is not read again.
    Format: https://github.com/huggingface/safetensors#format
    """
    if context.kept is not None:
        kept: dict[str, torch.Tensor] = context.kept.tensors(str(dtype))
        return kept
    names = _weight_files(context.model_dir)
    done = total = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        context.report(min(done, total), total)
        context.check_cancelled()

    with contextlib.ExitStack() as opened:
        files = []
        stored = []
        for index, name in enumerate(names):
            file = opened.enter_context(open(context.model_dir / name, "rb", buffering=0))
            header = _read_header(file.fileno(), name)
            files.append(file.fileno())
            stored += [
                _stored(name, index, entry, header.data_offset, dtype) for entry in header.tensors
            ]
            total += header.data_offset + header.tensor_bytes
            done += header.data_offset
        plan = Plan(stored)
        memory = (context.memory or OwnMemory)(plan.total_bytes)
        with plan.reading(names, files, memory, advance) as tensors:
            memory.describe(describe(memory.tensor, tensors, str(dtype)))
    context.report(total, total)
    return tensors


class OwnMemory:
    """Memory for weights where the worker gives none."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8)

    def prepare(self, start: int, length: int) -> None:
        """Do nothing: pages come as they are written."""

    def filled(self, start: int, length: int) -> None:
        """Do nothing: there is no device to send it to."""

    def describe(self, text: bytes) -> None:
        """Do nothing: it goes with the model."""


def _weight_files(model_dir: Path) -> list[str]:
    index = read_object(model_dir, "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict) and index:
        names = sorted({str(name) for name in index.values()})
        for name in names:
            if os.path.basename(name) != name or not (model_dir / name).is_file():
                raise LoadError(f"the weights' index names '{name}', which is not among the files")
        return names
    if (model_dir / "model.safetensors").is_file():
        return ["model.safetensors"]
    others = sorted(
        path.name for path in model_dir.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    found = f"; {', '.join(others[:3])} could run code and is not loaded" if others else ""
    raise LoadError(f"there is no model.safetensors{found}")


def _read_header(descriptor: int, name: str) -> Header:
    size = os.fstat(descriptor).st_size
    try:
        length = header_length(os.pread(descriptor, PREFIX_BYTES, 0), size, name)
        return parse_header(os.pread(descriptor, length, PREFIX_BYTES), size, name)
    except ModelhostError as error:
        # It was checked before it was published: what is wrong now happened on this disk.
        cause = error.metadata.get("cause", error.message)
        raise LoadError(
            f"{name} is damaged on disk ({cause}); `modelhost verify` finds what is, then `modelhost pull` fetches it again"
        ) from error


def _stored(
    name: str, file: int, entry: TensorEntry, data_offset: int, dtype: torch.dtype | None
) -> Stored:
    own = _TORCH.get(entry.dtype)
    if own is None:
        raise LoadError(f"{name}: tensor '{entry.name}' is {entry.dtype}, which is not supported")
    final = dtype if dtype is not None and own.is_floating_point else own
    start, length = data_offset + entry.start, entry.end - entry.start
    return Stored(entry.name, own, final, entry.shape, file, start, length)


def measure(module: torch.nn.Module) -> int:
    """Return the bytes that a module's parameters and buffers hold: shared storage counts once."""
    storages: dict[tuple[str, int], int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
