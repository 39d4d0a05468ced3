"""Artifacts hashed again on a real disk: what is wrong is put away and fetched anew, at the pace that is asked."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters.file_check import FileCheck
from modelhostd.adapters.layout import tree_at
from modelhostd.adapters.verifying import POLL_S, Verifying
from modelhostd.core.findings import FindingKind
from modelhostd.core.resources import Progress
from modelhostd.ports import Pace
from tests.adapters.downloads_support import FILES, SHA256, WEIGHTS, Site

MIB = 1 << 20


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one repository of two megabytes."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as hub:
        yield hub


@pytest.fixture
def site(tmp_path: Path, hub: LoopbackHub) -> Site:
    """A home that talks to it."""
    return Site(tmp_path / "home", hub)


def flip(site: Site) -> None:
    """Change one bit of the weights on disk."""
    path = site.files.model_dir("tiny", 1) / "model.safetensors"
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


async def test_what_is_damaged_is_put_away_and_fetched_again(site: Site, hub: LoopbackHub) -> None:
    """The wrong file lies in quarantine beside its promised digest, the artifact is out of sight."""
    await site.fetch()
    flip(site)
    (finding,) = await site.files.verify("tiny", 1, lambda _: None)
    assert finding.kind is FindingKind.CORRUPT_FILE
    assert (finding.expected, finding.repaired) == (SHA256, False)
    assert finding.actual == hashlib.sha256(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])).hexdigest()
    (entry,) = await site.files.quarantined()
    assert (entry.model, entry.path, entry.expected) == ("tiny", "model.safetensors", SHA256)
    assert entry.actual == finding.actual
    assert await site.files.delete_artifact("tiny", 1, keep_bytes=True) == 0
    assert site.visible() == []
    assert await site.files.check({}, deep=True, repair=False) == ()
    before = hub.sent_bytes("cdn")
    await site.fetch()
    assert site.content() == FILES
    assert hub.sent_bytes("cdn") - before == len(WEIGHTS)
    assert await site.files.verify("tiny", 1, lambda _: None) == ()


async def test_a_model_that_shares_the_damaged_file_is_found_by_its_own_verification(
    site: Site,
) -> None:
    """One inode, two models: each says so of itself, and each is mended by its own download."""
    await site.fetch()
    await site.fetch(model="other")
    flip(site)
    for model in ("tiny", "other"):
        (finding,) = await site.files.verify(model, 1, lambda _: None)
        assert finding.name == f"{model}/1/model.safetensors"
        await site.files.delete_artifact(model, 1, keep_bytes=True)
        await site.fetch(model=model)
        assert site.content(model) == FILES
        assert await site.files.verify(model, 1, lambda _: None) == ()


class Stop(threading.Event):
    """An event that never comes and remembers how long it was waited for."""

    def __init__(self, pace: Pace, then: list[float]) -> None:
        super().__init__()
        self.waits: list[float] = []
        self._pace = pace
        self._then = then

    def wait(self, timeout: float | None = None) -> bool:
        """Count the wait; the pace changes after each."""
        self.waits.append(timeout or 0.0)
        if self._then:
            self._pace.bytes_per_second = self._then.pop(0)
        return self.is_set()


async def paced(site: Site, pace: Pace, then: list[float]) -> Stop:
    """Verify at a pace that changes after each wait; return what was waited for."""
    await site.fetch()
    manifest = site.trees.read_manifest(tree_at("tiny", 1), "tiny/1")
    stop, told = Stop(pace, then), list[Progress]()
    # In this thread: its priority stays what it is, and no second is waited for.
    verifying = Verifying(FileCheck(site.store), manifest, told.append, stop, pace)
    worker = threading.Thread(target=verifying.run)
    worker.start()
    worker.join(60)
    assert told[-1].done_bytes == told[-1].total_bytes == sum(map(len, FILES.values()))
    return stop


async def test_reading_takes_as_long_as_the_pace_says(site: Site) -> None:
    """So many bytes, so many seconds; no wait is longer than a changed pace may take to act."""
    total = sum(map(len, FILES.values()))
    stop = await paced(site, Pace(MIB), [])
    assert sum(stop.waits) == pytest.approx(total / MIB, rel=0.01)
    assert max(stop.waits) <= POLL_S


async def test_a_pace_of_nothing_stands_still_until_it_changes(site: Site) -> None:
    """Waits that read nothing, then the new pace."""
    total = sum(map(len, FILES.values()))
    stop = await paced(site, Pace(0), [0.0] * 9 + [1e15])
    assert stop.waits[:10] == [POLL_S] * 10
    assert sum(stop.waits[10:]) == pytest.approx(total / 1e15, abs=1e-6)
