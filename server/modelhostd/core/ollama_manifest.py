"""A model of an Ollama registry: its manifest's layers as files, and the challenge of its login.

application/vnd.ollama.image.model      -> <name>.gguf
application/vnd.ollama.image.projector  -> mmproj-<name>.gguf
application/vnd.ollama.image.template   -> template.txt, and so on
"""

import json
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from modelhostd.core.values import dataclass

MANIFEST_BYTES_MAX = 1 << 20
LAYERS_MAX = 256
SIZE_MAX = 1 << 50
MEDIA_TYPE = "application/vnd.docker.distribution.manifest.v2+json"

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_LAYER = "application/vnd.ollama.image."
_NAMES = {
    "model": "{name}.gguf",
    "projector": "mmproj-{name}.gguf",
    "adapter": "adapter-{name}.gguf",
    "template": "template.txt",
    "system": "system.txt",
    "prompt": "prompt.txt",
    "license": "LICENSE.txt",
    "params": "params.json",
    "messages": "messages.json",
}
_PAIR = re.compile(r'([a-zA-Z]+)="([^"]*)"')


class BadManifest(ValueError):
    """An answer that is no manifest; ``str()`` says why in a few words."""


class OtherLayers(ValueError):
    """The model is there, and of a kind that has no GGUF file; ``str()`` says which."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a model."""

    path: str
    sha256: str
    size_bytes: int


def parse_manifest(data: bytes, name: str) -> tuple[Layer, ...]:
    """Return the files of a manifest for the model ``name``. Raises BadManifest, or OtherLayers."""
    try:
        manifest = json.loads(data)
        if manifest["schemaVersion"] != 2:
            raise BadManifest("a manifest of another version")
        listed = manifest["layers"]
        if not isinstance(listed, list) or not 0 < len(listed) <= LAYERS_MAX:
            raise BadManifest("no list of layers, or an endless one")
        return _layers(listed, name)
    except (BadManifest, OtherLayers):
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadManifest(f"not a manifest ({type(error).__name__})") from None


def _layers(listed: list[Mapping[str, object]], name: str) -> tuple[Layer, ...]:
    found: dict[str, Layer] = {}
    for one in listed:
        media, digest, size = one["mediaType"], one["digest"], one["size"]
        match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if match is None or type(size) is not int or not 0 <= size < SIZE_MAX:
            raise BadManifest("a layer with a malformed digest or size")
        kind = str(media).removeprefix(_LAYER)
        pattern = _NAMES.get(kind)
        if pattern is None:
            raise OtherLayers(ascii(kind)[1:-1][:40])
        path = _free(pattern.format(name=name), found)
        found[path] = Layer(path, match[1], size)
    if not any(path.endswith(".gguf") for path in found):
        raise OtherLayers("none with weights")
    return tuple(found.values())


def _free(path: str, taken: Mapping[str, object]) -> str:
    """``LICENSE.txt``, ``LICENSE-2.txt`` ...: a model may have several layers of a kind."""
    stem, _, suffix = path.rpartition(".")
    number = 1
    while path in taken:
        number += 1
        path = f"{stem}-{number}.{suffix}"
    return path


def parse_challenge(header: str) -> str | None:
    """Return where a token can be had by a WWW-Authenticate header: realm, service and scope as one URL.

    None where it is no Bearer challenge. The URL is not judged yet.
    """
    kind, _, rest = header.strip().partition(" ")
    if kind.lower() != "bearer" or len(rest) > 2048:
        return None
    told: dict[str, str] = {key.lower(): value for key, value in _PAIR.findall(rest)}
    realm = told.get("realm", "")
    try:
        parts = urlsplit(realm)
        query = parse_qsl(parts.query)
    except ValueError:
        return None
    if parts.scheme not in {"http", "https"} or parts.fragment:
        return None
    query += [(key, told[key]) for key in ("service", "scope") if told.get(key)]
    return urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(query), ""))


def parse_token(data: bytes) -> str:
    """Return the token of a realm's answer. Raises BadManifest."""
    try:
        answer = json.loads(data)
        token = answer.get("token") or answer.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        token = None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise BadManifest("no token where one was promised")
    if " " in token or len(token) > 16_384:
        raise BadManifest("a token that is none")
    return token
