"""The directories of models: built aside, made visible by one rename, taken out of sight before deletion.

Methods block and may be called from any thread; the event loop calls none of them.
"""

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress

from modelhostd.adapters.blobs import BlobStore, Stopped
from modelhostd.adapters.failpoints import hit
from modelhostd.adapters.layout import (
    FILES,
    MANIFEST,
    MODELS,
    TRASH,
    TREES,
    blob_at,
    disk_error,
    disk_errors,
    open_regular,
    tree_at,
    write_all,
)
from modelhostd.core import manifest as manifests
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.manifest import Manifest


class TreeStore:
    """The trees of one home directory, over its blob store."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._lock = threading.Lock()
        self._published: set[tuple[str, int]] = set()

    def published(self, model: str, version: int) -> bool:
        """Tell whether this process made the tree: its row may still be on the way."""
        with self._lock:
            return (model, version) in self._published

    def on_disk(self, models: Iterable[str]) -> dict[str, list[int]]:
        """Return the versions of these models that have a tree; models without one are left out."""
        found = {}
        for model in models:
            names = self._blobs.home.names(*MODELS, model)
            versions = sorted(int(n) for n in names if n.isascii() and n.isdigit())
            if versions:
                found[model] = versions
        return found

    def publish(self, manifest: Manifest, cancelled: Callable[[], bool]) -> None:
        """Make an artifact visible as a whole: every blob is there and durable, then one rename.

        A tree of the same model and version (left by a crash before its row) is replaced. Raises
        Stopped when cancelled before the rename.
        """
        model, version = manifest.model, manifest.version
        path = self._blobs.home.shown(*tree_at(model, version))
        name = f"{model}-{version}-{uuid.uuid4().hex[:12]}"
        with disk_errors(path), self._blobs.commit:
            hit("publish.begin")
            sizes = {f.sha256: f.size_bytes for f in manifest.files}
            try:
                # First of all: after a crash it tells that there may be blobs without a tree.
                with self._blobs.home.directory(*TREES, name, create=True) as tree:
                    self._blobs.store_verified(sizes)
                    self._build_tree(tree, (*TREES, name), manifest)
                if cancelled():
                    raise Stopped
                self._remove_locked(model, version)
                self._show(name, model, version)
            except BaseException:
                with self._blobs.home.directory(*TREES) as trees:
                    shutil.rmtree(name, ignore_errors=True, dir_fd=trees)
                with suppress(OSError, ModelhostError):
                    self._blobs.give_back(sizes)
                raise
            hit("publish.done")

    def _show(self, name: str, model: str, version: int) -> None:
        """The one rename. Where it cannot be made durable, it is taken back: an error means nothing."""
        home = self._blobs.home
        with (
            home.directory(*TREES) as trees,
            home.directory(*MODELS, model, create=True) as versions,
        ):
            with self._lock:
                self._published.add((model, version))
            os.rename(name, str(version), src_dir_fd=trees, dst_dir_fd=versions)
            try:
                hit("publish.tree_renamed")
                os.fsync(versions)
            except OSError:
                os.rename(str(version), name, src_dir_fd=versions, dst_dir_fd=trees)
                raise

    def _build_tree(self, tree: int, root: tuple[str, ...], manifest: Manifest) -> None:
        folders: set[tuple[str, ...]] = {(*root, FILES)}
        with self._blobs.home.directory(*root, FILES, create=True):
            pass
        for file in manifest.files:
            segments = (*root, FILES, *file.path.split("/"))
            folders.update(segments[:end] for end in range(len(root) + 1, len(segments)))
            with (
                self._blobs.home.parent(blob_at(file.sha256)) as (blobs, blob),
                self._blobs.home.parent(segments, create=True) as (folder, name),
            ):
                os.link(blob, name, src_dir_fd=blobs, dst_dir_fd=folder, follow_symlinks=False)
        hit("publish.tree_linked")
        fd = open_regular(tree, MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            write_all(fd, manifests.encode(manifest))
            os.fsync(fd)
        finally:
            os.close(fd)
        hit("publish.manifest_synced")
        for segments in sorted(folders, key=len, reverse=True):
            with self._blobs.home.directory(*segments) as folder:
                os.fsync(folder)
        os.fsync(tree)
        hit("publish.tree_synced")

    def read_manifest(self, segments: tuple[str, ...], name: str) -> Manifest:
        """Return the manifest of a tree. Raises STORAGE_ERROR when it is gone or broken."""
        path = self._blobs.home.shown(*segments, MANIFEST)
        try:
            fd = self._blobs.home.open_file((*segments, MANIFEST))
            with os.fdopen(fd, "rb") as file:
                data = file.read(manifests.MANIFEST_BYTES_MAX + 1)
        except FileNotFoundError:
            raise ModelhostError(
                Reason.STORAGE_ERROR,
                f"{name} has no manifest at {path}; download the model again",
                {"path": str(path), "cause": "missing"},
            ) from None
        except OSError as error:
            raise disk_error(error, path) from error
        return manifests.decode(data, name)

    def remove(self, model: str, version: int, *, keep_bytes: bool = False) -> int:
        """Remove an artifact and the blobs that nobody else needs; return the bytes freed.

        With ``keep_bytes`` those blobs are verified files again, and nothing is freed.
        """
        with disk_errors(self._blobs.home.shown(*tree_at(model, version))), self._blobs.commit:
            hit("delete.begin")
            freed = self._remove_locked(model, version, keep_bytes=keep_bytes)
            with self._lock:
                self._published.discard((model, version))
            with suppress(OSError), self._blobs.home.directory(*MODELS) as models:
                os.rmdir(model, dir_fd=models)  # only when it is empty
        return freed

    def _remove_locked(self, model: str, version: int, *, keep_bytes: bool = False) -> int:
        name = f"{model}-{version}-{uuid.uuid4().hex[:12]}"
        try:
            with (
                self._blobs.home.directory(*MODELS, model) as versions,
                self._blobs.home.directory(*TRASH) as trash,
            ):
                os.rename(str(version), name, src_dir_fd=versions, dst_dir_fd=trash)
                hit("delete.renamed")
                os.fsync(trash)
                os.fsync(versions)
        except FileNotFoundError:
            return 0
        return self._empty_trash(name, keep_bytes=keep_bytes)

    def _empty_trash(self, name: str, *, keep_bytes: bool = False) -> int:
        """Remove one thing in the trash. The manifest goes last: a crash in between finds it again."""
        try:
            digests = {f.sha256 for f in self.read_manifest((*TRASH, name), name).files}
        except (ModelhostError, OSError):
            digests = set()
        with self._blobs.home.directory(*TRASH) as trash:
            with suppress(FileNotFoundError, NotADirectoryError):
                shutil.rmtree(os.path.join(name, FILES), dir_fd=trash)
            hit("delete.unlinked")
            if keep_bytes:
                self._blobs.give_back(sorted(digests))
            freed = sum(self._blobs.drop_blob(sha256) for sha256 in sorted(digests))
            try:
                shutil.rmtree(name, dir_fd=trash)
            except NotADirectoryError:
                os.unlink(name, dir_fd=trash)
        hit("delete.done")
        return freed

    def recover(self) -> None:
        """Finish what a crash interrupted: half-built trees, half-emptied trash, journals without a
        part. At start, once. Parts and verified files stay, blobs that wait for their tree are verified
        files again: downloads go on from them.
        """
        home = self._blobs.home
        with disk_errors(home.path), self._blobs.commit:
            for name in home.names(*TRASH):
                self._empty_trash(name)
            if cut_off := home.names(*TREES):
                with home.directory(*TREES) as trees:
                    for name in cut_off:
                        with suppress(FileNotFoundError):
                            shutil.rmtree(os.path.join(name, FILES), dir_fd=trees)
                    self._blobs.give_back(self._blobs.digests())
                    # Last: while they are there, blobs without a tree are looked for.
                    for name in cut_off:
                        shutil.rmtree(name, dir_fd=trees)
            self._blobs.drop_lone_journals()
