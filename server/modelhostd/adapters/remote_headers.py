"""The memory of a model before it is downloaded: the headers of its safetensors files, by ranges.

What is in a GGUF file is loaded as it is: its size is near enough.
"""

from dataclasses import replace

from modelhostd.adapters.connections import Connections
from modelhostd.adapters.source import Changed, Reader, SourceAdapter
from modelhostd.adapters.wire import Transient, bad_reply
from modelhostd.core.errors import ModelhostError
from modelhostd.core.safetensors_header import (
    PREFIX_BYTES,
    Header,
    header_length,
    parse_header,
    predicted_bytes,
)
from modelhostd.ports import RemoteFile, SourceFacts

FILES_MAX = 8
"""Of more files the sizes are summed instead: headers are some thousandth of them."""
FIRST_BYTES = 64 << 10
"""Asked for first: most headers are shorter, so that one request is enough."""


def predict(adapter: SourceAdapter, connections: Connections, facts: SourceFacts) -> SourceFacts:
    """Return the facts with ``predicted_bytes``; 0 where it cannot be told (gated, no ranges, broken).

    Never fails for it: what a source has can be told without.
    """
    weights = [file for file in facts.files if file.path.endswith(".safetensors")]
    if not weights:
        whole = [file.size_bytes for file in facts.files if file.path.endswith(".gguf")]
        return replace(facts, predicted_bytes=sum(whole))
    if len(weights) > FILES_MAX:
        return replace(facts, predicted_bytes=sum(file.size_bytes for file in weights))
    try:
        headers = [
            _remote_header(
                adapter.reader(connections, facts.source, facts.revision, file), file, connections
            )
            for file in weights
        ]
    except (ModelhostError, Transient, Changed):
        return facts
    return replace(facts, predicted_bytes=predicted_bytes(headers))


def _remote_header(reader: Reader, file: RemoteFile, connections: Connections) -> Header:
    size = file.size_bytes
    head = _range(reader, connections, 0, min(FIRST_BYTES, size))
    length = header_length(head[:PREFIX_BYTES], size, file.path)
    end = PREFIX_BYTES + length
    if end > len(head):
        head += _range(reader, connections, len(head), end)
    return parse_header(head[PREFIX_BYTES:end], size, file.path)


def _range(reader: Reader, connections: Connections, start: int, end: int) -> bytes:
    body = reader.open(start, end)
    try:
        if body.start != start:
            raise bad_reply(connections.source, "no ranges")
        data = bytearray(end - start)
        view = memoryview(data)
        while view and (count := body.read_into(view)):
            view = view[count:]
        if view:
            raise bad_reply(connections.source, "a range cut short")
    except BaseException:
        body.close()
        raise
    # Read to its end the connection is used again; more than was asked for is not read.
    if body.read_into(memoryview(bytearray(1))):
        body.close()
    return bytes(data)
