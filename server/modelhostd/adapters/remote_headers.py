"""The memory of a model before it is downloaded: the headers of its safetensors files, by ranges."""

from dataclasses import replace

from modelhostd.adapters.connections import Connections
from modelhostd.adapters.hub import Hub
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


def predict(hub: Hub, connections: Connections, facts: SourceFacts) -> SourceFacts:
    """Return the facts with ``predicted_bytes``; 0 where it cannot be told (gated, no ranges, broken).

    Never fails for it: what a source has can be told without.
    """
    weights = [file for file in facts.files if file.path.endswith(".safetensors")]
    if len(weights) > FILES_MAX:
        return replace(facts, predicted_bytes=sum(file.size_bytes for file in weights))
    try:
        headers = [_remote_header(hub, connections, facts, file) for file in weights]
    except (ModelhostError, Transient):
        return facts
    return replace(facts, predicted_bytes=predicted_bytes(headers))


def _remote_header(
    hub: Hub, connections: Connections, facts: SourceFacts, file: RemoteFile
) -> Header:
    if file.sha256:
        url = hub.locate(connections, facts.source, facts.revision, file)
    else:
        url = hub.resolve_url(facts.source, facts.revision, file.path)
    size = file.size_bytes
    head = _range(hub, connections, url, 0, min(FIRST_BYTES, size), size)
    length = header_length(head[:PREFIX_BYTES], size, file.path)
    end = PREFIX_BYTES + length
    if end > len(head):
        head += _range(hub, connections, url, len(head), end, size)
    return parse_header(head[PREFIX_BYTES:end], size, file.path)


def _range(hub: Hub, connections: Connections, url: str, start: int, end: int, size: int) -> bytes:
    headers = {"Range": f"bytes={start}-{end - 1}", "User-Agent": hub.user_agent}
    response = connections.request("GET", url, headers, credential=hub.credential())
    whole = response.status == 200 and start == 0 and end == size
    if not whole and response.headers.get("Content-Range") != f"bytes {start}-{end - 1}/{size}":
        response.close()
        raise bad_reply(connections.source, "no ranges")
    data = response.read_all(end - start)
    if len(data) != end - start:
        raise bad_reply(connections.source, "a range cut short")
    return data
