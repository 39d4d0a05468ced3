"""Space on disk: promises that no two downloads share, the budget, and what is stored of uses."""

import errno
import json
import os
import random
import threading
from pathlib import Path

import pytest

from modelhostd.adapters import uses
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.layout import Home
from modelhostd.adapters.space import SpaceLedger
from modelhostd.core.errors import ModelhostError, Reason

GIB = 1 << 30


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def ledger(home: Home, free: int = 1000, total: int = 5000, reserve: int = 100) -> SpaceLedger:
    return SpaceLedger(home, reserve, lambda: (free, total))


def short(space: SpaceLedger, needed: int, owner: str = "x") -> ModelhostError:
    """Return what a promise is refused with."""
    with pytest.raises(ModelhostError) as caught:
        space.promise(owner, needed)
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    return caught.value


def test_two_downloads_cannot_promise_the_same_space(home: Home) -> None:
    """What the first has not written yet is not the second's; the numbers and the next step are told."""
    space = ledger(home)
    written = space.promise("a", 600)
    error = short(space, 301)
    assert error.metadata["neededBytes"] == "301"
    assert error.metadata["freeBytes"] == "300"
    assert "free 1 bytes" in error.message
    space.promise("b", 300)
    assert space.room().reserved_bytes == 900
    written(600)
    assert space.room().reserved_bytes == 300
    written(600)  # never below nothing: another's promise is not touched
    assert space.room().reserved_bytes == 300
    space.release("b")
    space.release("b")
    assert space.room().available_bytes == 900


def test_what_can_never_fit_is_not_told_to_free_some(home: Home) -> None:
    """Beyond the whole budget, or the whole disk, no deletion helps: what helps is said."""
    space = ledger(home, free=1000, total=5000, reserve=100)
    assert "larger disk" in short(space, 4901).message
    space.limit(800)
    error = short(space, 801)
    assert "settings.disk_budget_bytes to at least 801" in error.message
    assert "free 1" not in error.message
    assert "larger disk" in short(space, 4901).message


def test_what_stays_free_is_told_where_it_is_the_reason(home: Home) -> None:
    """Else who looks at the disk sees room that is refused."""
    space = ledger(home, free=1000, reserve=100)
    assert "the disk's last 100 stay free" in short(space, 950).message
    assert "stay free" not in short(space, 1001).message


def test_the_budget_counts_what_is_there(home: Home, tmp_path: Path) -> None:
    """Blobs, parts, verified files and quarantine; a hole in a part is no byte."""
    space = ledger(home, free=10 * GIB, total=20 * GIB)
    root = tmp_path / "home"
    for place in ("blobs/sha256/ab", "staging/parts", "staging/verified", "quarantine/tree/files"):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "file").write_bytes(b"x" * 8192)
    with (root / "staging/parts/sparse.part").open("wb") as file:
        file.truncate(GIB)
    assert space.used_bytes() == 4 * 8192
    space.limit(5 * 8192)
    room = space.room()
    assert (room.available_bytes, room.most_bytes) == (8192, 5 * 8192)
    error = short(space, 8193)
    assert "budget of 40960" in error.message
    assert "disk_budget_bytes" in error.message
    space.promise("a", 8192)
    short(space, 1)
    space.limit(0)
    space.promise("b", GIB)


def test_nothing_is_promised_to_who_is_gone(home: Home) -> None:
    """A download that was cancelled meanwhile has nobody left to release its promise."""
    space = ledger(home)
    space.promise("a", 900, lambda: True)
    assert space.room().reserved_bytes == 0


def test_promises_at_once_never_exceed_what_is_there(home: Home) -> None:
    """Many threads promise, write and release: the sum of promises and bytes stays below the disk."""
    lock, disk = threading.Lock(), {"free": 10_000}
    space = SpaceLedger(home, 0, lambda: (disk["free"], 10_000))
    problems: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for number in range(60):
            needed, owner = chance.randrange(1, 4000), f"{seed}-{number}"
            try:
                written = space.promise(owner, needed)
            except ModelhostError:
                continue
            while needed:
                step = min(needed, chance.randrange(1, 900))
                with lock:
                    disk["free"] -= step
                    if disk["free"] < 0:
                        problems.append(owner)
                written(step)
                needed -= step
            with lock:
                disk["free"] = min(10_000, disk["free"] + chance.randrange(3000))
            space.release(owner)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert space.room().reserved_bytes == 0


def test_held_blobs_are_told(tmp_path: Path) -> None:
    """As long as a download counts on them, and no longer."""
    store = BlobStore(StoreConfig(tmp_path / "home"))
    with store.hold(["a", "b"]), store.hold(["b"]):
        assert store.held_digests() == {"a", "b"}
    assert store.held_digests() == frozenset()


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b'{"../x": 1, "Tiny": 2, "tiny": "3", "t2": true, "t3": -1, "t4": 1e300}'],
)
def test_a_broken_file_of_uses_says_nothing(tmp_path: Path, text: bytes) -> None:
    """Whatever is in it."""
    (tmp_path / uses.FILE_NAME).write_bytes(text)
    assert uses.read_uses(tmp_path) == {}


def test_uses_are_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves what was stored before, and no half beside it."""
    uses.write_uses(tmp_path, {"tiny": 1.5})

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"):
        uses.write_uses(tmp_path, {"tiny": 2.5})
    monkeypatch.undo()
    assert uses.read_uses(tmp_path) == {"tiny": 1.5}
    assert [path.name for path in tmp_path.iterdir()] == [uses.FILE_NAME]
    assert json.loads((tmp_path / uses.FILE_NAME).read_text()) == {"tiny": 1.5}
    assert (tmp_path / uses.FILE_NAME).stat().st_mode & 0o777 == 0o600
