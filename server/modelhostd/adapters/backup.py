"""A copy of the registry beside the database: what `modelhost import` reads when all else is lost.

`fsck --rebuild` brings models back from their manifests; pins, budgets and settings are in this file alone.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiofiles
import aiofiles.os

FILE_NAME = "registry.json"


async def write_backup(home: Path, document: AsyncIterator[bytes]) -> Path:
    """Write the document to ``registry.json`` in ``home``, whole or not at all; returns its path.

    Raises OSError; then the copy that was there stays.
    """
    path = home / FILE_NAME
    part = path.with_suffix(".part")
    async with aiofiles.open(part, "wb", opener=_private) as file:
        async for chunk in document:
            await file.write(chunk)
        await file.flush()
        await aiofiles.os.wrap(os.fsync)(file.fileno())
    await aiofiles.os.replace(part, path)
    return path


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
