"""The registry's copy on disk is whole or the one before."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelhostd.adapters.backup import write_backup


async def _chunks(*chunks: bytes, broken: bool = False) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if broken:
        raise OSError("the source of the document broke")


async def test_a_copy_is_written_whole_and_private(tmp_path: Path) -> None:
    """What the chunks say is in the file, which nobody else may read."""
    path = await write_backup(tmp_path, _chunks(b'{"models"', b": []}"))
    assert json.loads(path.read_bytes()) == {"models": []}
    assert path.stat().st_mode & 0o077 == 0


async def test_a_copy_that_breaks_leaves_the_one_before(tmp_path: Path) -> None:
    """A document that ends in an error never replaces a whole one."""
    path = await write_backup(tmp_path, _chunks(b"{}"))
    with pytest.raises(OSError, match="broke"):
        await write_backup(tmp_path, _chunks(b'{"half', broken=True))
    assert path.read_bytes() == b"{}"
