"""Checks of fetched files by their content, before anything becomes visible. Blocking."""

import os
from contextlib import suppress

from modelhostd.core.formats import SNIFF_BYTES, check_content
from modelhostd.core.gguf_header import HEADER_BYTES_MAX, MoreNeeded, parse_gguf
from modelhostd.core.safetensors_header import (
    PREFIX_BYTES,
    Header,
    header_length,
    malformed,
    parse_header,
)

GGUF_HEAD_BYTES = 1 << 20


def check_file(fd: int, path: str, source: str, *, allow_unsafe: bool = False) -> Header | None:
    """Check one open file; return the header of a safetensors file, None for any other.

    Raises UNSAFE_FILE for pickles, archives and programs under any name (unless allowed), and
    MALFORMED_FILE for a safetensors file whose header does not describe it exactly, or a GGUF file
    whose header does not fit into it.
    """
    size = os.fstat(fd).st_size
    head = os.pread(fd, SNIFF_BYTES, 0)
    safetensors = path.lower().endswith(".safetensors")
    # A safetensors file begins with its header's length, and any first bytes may be one by chance:
    # what follows tells.
    if not allow_unsafe and not (safetensors and head[PREFIX_BYTES : PREFIX_BYTES + 1] == b"{"):
        check_content(path, head, source)
    if path.lower().endswith(".gguf"):
        _check_gguf(fd, path, size)
    if not safetensors:
        return None
    length = header_length(head[:PREFIX_BYTES], size, path)
    header = os.pread(fd, length, PREFIX_BYTES)
    if len(header) != length:
        raise malformed(path, f"the header ends after {len(header)} of {length} bytes")
    return parse_header(header, size, path)


def _check_gguf(fd: int, path: str, size: int) -> None:
    """Read as much as the header takes: mostly one piece, with a large vocabulary some more."""
    length = GGUF_HEAD_BYTES
    while length < HEADER_BYTES_MAX:
        with suppress(MoreNeeded):
            parse_gguf(os.pread(fd, length, 0), size, path)
            return
        length *= 4
    parse_gguf(os.pread(fd, HEADER_BYTES_MAX, 0), size, path)
