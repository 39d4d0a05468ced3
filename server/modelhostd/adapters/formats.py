"""Checks of fetched files by their content, before anything becomes visible. Blocking."""

import os

from modelhostd.core.formats import SNIFF_BYTES, check_content
from modelhostd.core.safetensors_header import (
    PREFIX_BYTES,
    Header,
    header_length,
    malformed,
    parse_header,
)


def check_file(fd: int, path: str, source: str, *, allow_unsafe: bool = False) -> Header | None:
    """Check one open file; return the header of a safetensors file, None for any other.

    Raises UNSAFE_FILE for pickles, archives and programs under any name (unless allowed), and
    MALFORMED_FILE for a safetensors file whose header does not describe it exactly.
    """
    size = os.fstat(fd).st_size
    head = os.pread(fd, SNIFF_BYTES, 0)
    safetensors = path.lower().endswith(".safetensors")
    # A safetensors file begins with its header's length, and any first bytes may be one by chance:
    # what follows tells.
    if not allow_unsafe and not (safetensors and head[PREFIX_BYTES : PREFIX_BYTES + 1] == b"{"):
        check_content(path, head, source)
    if not safetensors:
        return None
    length = header_length(head[:PREFIX_BYTES], size, path)
    header = os.pread(fd, length, PREFIX_BYTES)
    if len(header) != length:
        raise malformed(path, f"the header ends after {len(header)} of {length} bytes")
    return parse_header(header, size, path)
