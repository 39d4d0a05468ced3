"""What the loopback Hub serves: files, commits, repositories; and what can go wrong on the way."""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

Content = bytes | Path

# What the Hub keeps in Git LFS whatever its size; anything else from LFS_BYTES on.
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".onnx", ".h5", ".msgpack", ".ckpt")
LFS_BYTES = 10 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit. ``oid`` is the git blob SHA-1, of the pointer text for an LFS file."""

    path: str
    content: Content
    size: int
    sha256: str
    oid: str
    lfs: bool
    pointer_size: int

    @classmethod
    def of(cls, path: str, content: Content, *, lfs: bool | None = None) -> Self:
        """Hash a file; ``lfs`` None = decided as the Hub does, by suffix and size."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if isinstance(content, bytes):
            sha256 = hashlib.sha256(content).hexdigest()
        else:
            with content.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if lfs is None:
            lfs = path.endswith(LFS_SUFFIXES) or size >= LFS_BYTES
        if lfs:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
            return cls(path, content, size, sha256, git_oid(text.encode()), lfs, len(text))
        data = content if isinstance(content, bytes) else content.read_bytes()
        return cls(path, content, size, sha256, git_oid(data), lfs, 0)


def git_oid(data: bytes) -> str:
    """Return git's name of a blob: the SHA-1 of a header with its length, and its bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Repo:
    """One repository: commits, branches, and what its card says.

    Private and gated ones are open to the tokens in ``readers``.
    """

    def __init__(
        self,
        files: Mapping[str, Content],
        *,
        pipeline_tag: str = "",
        licence: str = "apache-2.0",
        tags: tuple[str, ...] = (),
        private: bool = False,
        gated: bool = False,
        disabled: bool = False,
        readers: tuple[str, ...] = (),
        lfs: Mapping[str, bool] | None = None,
    ) -> None:
        self.pipeline_tag = pipeline_tag
        self.tags = (*tags, f"license:{licence}") if licence else tags
        self.licence = licence
        self.private, self.gated, self.disabled = private, gated, disabled
        self.readers = frozenset(readers)
        self.commits: dict[str, dict[str, HubFile]] = {}
        self.refs: dict[str, str] = {}
        self.commit(files, lfs=lfs)

    def commit(
        self,
        files: Mapping[str, Content],
        *,
        branch: str = "main",
        lfs: Mapping[str, bool] | None = None,
    ) -> str:
        """Put a new commit with exactly these files on a branch; return its hash."""
        listed = {p: HubFile.of(p, c, lfs=(lfs or {}).get(p)) for p, c in files.items()}
        seed = f"{self.refs.get(branch)}{sorted((f.path, f.oid) for f in listed.values())}"
        commit = hashlib.sha1(seed.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = listed
        self.refs[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """Return the commit a branch, tag or commit hash stands for."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    @property
    def head(self) -> str:
        """The commit of the main branch."""
        return self.refs["main"]

    @classmethod
    def from_folder(cls, folder: Path, *, pipeline_tag: str = "", licence: str = "") -> Self:
        """Serve every regular file below a folder, read from disk as it is asked for.

        What is not given is what the folder's card (README.md) says, as on the Hub.
        """
        files: dict[str, Content] = {
            str(path.relative_to(folder)): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }
        card = _card(folder / "README.md")
        return cls(
            files,
            pipeline_tag=pipeline_tag or str(card.get("pipeline_tag") or ""),
            licence=licence or str(card.get("license") or ""),
            tags=tuple(str(tag) for tag in card.get("tags") or ()),
        )


def _card(readme: Path) -> Mapping[str, Any]:
    """Return the metadata at the head of a model card; nothing where there is no card or no metadata."""
    from huggingface_hub import metadata_load

    return (metadata_load(readme) if readme.is_file() else None) or {}


@dataclass
class Fault:
    """What goes wrong with the next requests whose path matches; several are used up in order.

    ``match`` is a shell pattern on the path without its query; ``where`` is ``hub``, ``cdn`` or empty
    for both. Sizes count bytes of the body. ``reached`` is set when a stall begins or a fault is used.
    """

    match: str
    where: str = ""
    method: str = ""
    times: int = 1
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    drop: bool = False
    """Close without an answer."""
    reset: bool = False
    """With ``drop`` or ``cut_after``: RST instead of FIN."""
    delay_s: float = 0.0
    gate: threading.Event | None = None
    """Answer only once it is set."""
    cut_after: int | None = None
    stall_after: int | None = None
    """Send so much, then nothing, until the client goes or the hub stops."""
    rate: int = 0
    """Bytes per second."""
    ignore_range: bool = False
    content_range: str = ""
    """Answer a range with this Content-Range."""
    corrupt_at: int | None = None
    """Flip one bit of the byte at this offset of the file."""
    content_encoding: str = ""
    chunked: bool = False
    """Send the body chunked, without Content-Length."""
    reached: threading.Event = field(default_factory=threading.Event)
    used: int = 0


@dataclass(slots=True)
class LoggedRequest:
    """One request as it came, header names lower-case; its answer's status and body bytes grow."""

    where: str
    method: str
    path: str
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0
