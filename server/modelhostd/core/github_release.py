"""A GitHub release as its API tells it: the assets, and what makes two answers the same release."""

import hashlib
import json
import re

from modelhostd.core.values import dataclass

RELEASE_BYTES_MAX = 8 << 20
ASSETS_MAX = 1000
SIZE_MAX = 1 << 50

_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")


class BadRelease(ValueError):
    """An answer that is no release; ``str()`` says why in a few words."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of a release."""

    id: int
    name: str
    size_bytes: int
    sha256: str
    """Empty for assets from before GitHub told digests (June 2025)."""


@dataclass(frozen=True, slots=True)
class Release:
    """The assets that are complete, in GitHub's order."""

    tag: str
    assets: tuple[Asset, ...]

    @property
    def revision(self) -> str:
        """The tag, and what changes when an asset is replaced under its name."""
        told = repr(sorted((a.name, a.sha256 or a.id, a.size_bytes) for a in self.assets))
        return f"{self.tag}+{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def tag_of(revision: str) -> str:
    """Return the tag of a release's ``revision``."""
    return revision.rpartition("+")[0]


def parse_release(data: bytes) -> Release:
    """Return the release of an answer. Raises BadRelease."""
    try:
        release = json.loads(data)
        tag, listed = release["tag_name"], release["assets"]
        if not isinstance(tag, str) or not 0 < len(tag) <= 256 or not tag.isprintable():
            raise BadRelease("no tag")
        if not isinstance(listed, list) or len(listed) > ASSETS_MAX:
            raise BadRelease("no list of assets, or an endless one")
        assets = tuple(_asset(one) for one in listed if one["state"] == "uploaded")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, BadRelease):
            raise
        raise BadRelease(f"not GitHub's JSON ({type(error).__name__})") from None
    if len({asset.name for asset in assets}) != len(assets):
        raise BadRelease("an asset twice")
    return Release(tag, assets)


def _asset(one: dict[str, object]) -> Asset:
    number, name, size, digest = one["id"], one["name"], one["size"], one.get("digest")
    if type(number) is not int or number < 0 or not isinstance(name, str) or not name:
        raise BadRelease("an asset without an id or a name")
    if type(size) is not int or not 0 <= size < SIZE_MAX:
        raise BadRelease(f"a size of {ascii(size)[:40]}")
    if digest is None:
        return Asset(number, name, size, "")
    match = _SHA256.fullmatch(digest) if isinstance(digest, str) else None
    if match is None:
        raise BadRelease("a malformed digest")
    return Asset(number, name, size, match[1])
