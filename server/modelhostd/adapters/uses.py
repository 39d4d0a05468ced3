"""When each model was last used, in a file beside the database: no row, no event, no loss that matters. Blocking."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from modelhostd.adapters.layout import write_all
from modelhostd.core.names import ID

FILE_NAME = "uses.json"
FILE_BYTES_MAX = 4 << 20
MODELS_MAX = 10_000


def read_uses(home: Path) -> Mapping[str, float]:
    """Return model id -> seconds since the epoch; empty where the file is gone or broken."""
    try:
        fd = os.open(home / FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            raw = json.loads(file.read(FILE_BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(raw, dict):
        return {}
    return {
        model: float(time)
        for model, time in raw.items()
        if ID.fullmatch(model) and type(time) in (int, float) and 0 <= time < 1e12
    }


def write_uses(home: Path, uses: Mapping[str, float]) -> None:
    """Store them, whole or not at all. Raises OSError; then what was stored stays."""
    newest = sorted(uses.items(), key=lambda item: -item[1])[:MODELS_MAX]
    part = home / f"{FILE_NAME}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(part, flags, 0o600)
    try:
        write_all(fd, json.dumps(dict(newest)).encode())
        os.fsync(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    finally:
        os.close(fd)
    os.replace(part, home / FILE_NAME)
