"""kill -9 while a model is downloaded: nothing half is visible, and the next process goes on."""

import asyncio
import hashlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters import failpoints
from modelhostd.adapters.layout import Home
from modelhostd.adapters.parts import BOOT_ID, Journal, kept_spans
from modelhostd.core.errors import ModelhostError
from modelhostd.core.findings import FindingKind
from modelhostd.core.spans import Spans
from tests.adapters.downloads_support import Site, start_child, tiny
from tests.support import wait_until

SIZE = 3_000_000
FILES = tiny(SIZE)
WEIGHTS = FILES["model.safetensors"]
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
POINTS = [name for name in failpoints.NAMES if not name.startswith("database.")]
KILLS = int(os.environ.get("MODELHOST_TEST_KILLS", "6"))


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one repository of three megabytes."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as hub:
        yield hub


@pytest.fixture
def site(tmp_path: Path, hub: LoopbackHub) -> Site:
    """The home that the child works in, seen from here."""
    return Site(tmp_path / "home", hub)


def kill(child: "subprocess.Popen[bytes]") -> bytes:
    """SIGKILL it, reap it, return what it printed."""
    child.kill()
    out, _ = child.communicate(timeout=200)
    return out


async def assert_whole_or_absent(site: Site) -> None:
    """What a reader may see after a crash: the complete artifact, or none."""
    if site.visible():
        assert site.visible() == ["tiny/1"]
        assert site.content() == FILES
        assert await site.files.verify("tiny", 1, lambda _: None) == ()
    else:
        with pytest.raises(ModelhostError):
            await site.files.list_files("tiny", 1)


async def written(site: Site, count: int) -> None:
    """Wait until so many bytes of the weights are on disk and in the journal."""
    await asyncio.to_thread(
        wait_until, lambda: kept_spans(site.store.home, SHA256, len(WEIGHTS)).total == count
    )


async def finish(site: Site) -> None:
    """Recover, download again as the daemon would, and hold the result against everything."""
    await site.files.recover()
    # A tree without its row is the next start's to take up; all else is in order by now.
    found = await site.files.check({"tiny": [1]}, deep=True, repair=False)
    assert {finding.kind for finding in found} <= {FindingKind.MISSING_TREE}
    await site.fetch()
    assert site.content() == FILES
    assert await site.files.check({"tiny": [1]}, deep=True, repair=False) == ()
    assert (await site.files.use()).staging_bytes == 0


async def test_a_killed_download_fetches_exactly_what_is_missing(
    site: Site, hub: LoopbackHub
) -> None:
    """SIGKILL in mid-file: the next process asks for the rest, byte for byte."""
    hub.fault(Fault(f"/{SHA256}", stall_after=2_000_000))
    child = start_child(site)
    await written(site, 2_000_000)
    assert kill(child) == b""
    await assert_whole_or_absent(site)
    # A request is logged when its connection is seen to be gone.
    await asyncio.to_thread(wait_until, lambda: hub.sent_bytes("cdn"))
    before = hub.sent_bytes("cdn")
    fetched = await site.fetch()
    assert site.content() == FILES
    assert hub.sent_bytes("cdn") - before == len(WEIGHTS) - 2_000_000
    assert fetched.reused_bytes >= 2_000_000


@pytest.mark.parametrize(
    ("point", "how"),
    [
        *((point, "whole") for point in POINTS),
        # From the whole part on it is all the same.
        *((point, "ranged") for point in POINTS if point.startswith("part.")),
    ],
)
async def test_a_kill_at_each_step_is_recovered_from(site: Site, point: str, how: str) -> None:
    """Before and after every rename and sync of a download, and of a deletion."""
    rounds = 2 if point.startswith("delete.") else 1
    nth = "@9" if how == "ranged" and point in {"part.written", "part.marked"} else ""
    child = start_child(site, rounds, how, **{failpoints.VARIABLE: f"{point}=kill{nth}"})
    out, _ = await asyncio.to_thread(child.communicate, None, 60)
    assert child.returncode == -signal.SIGKILL
    assert out == b""
    await assert_whole_or_absent(site)
    await finish(site)


def total_sent(hub: LoopbackHub) -> int:
    """Return how many bytes of files and answers the hub has finished sending."""
    return hub.sent_bytes("cdn") + hub.sent_bytes("hub")


async def test_kills_at_random_moments_leave_nothing_half(site: Site) -> None:
    """Downloads and deletions in a loop, killed anywhere."""
    rng = random.Random(7)
    for _ in range(KILLS):
        site.hub.rate = rng.choice([0, 30_000_000])
        point = f"{rng.choice(POINTS)}=kill@{rng.randrange(1, 12)}" if rng.random() < 0.5 else ""
        goal = total_sent(site.hub) + rng.randrange(2 * SIZE)
        how = rng.choice(["whole", "ranged"])
        child = start_child(site, 1000, how, **{failpoints.VARIABLE: point})

        def over(child: "subprocess.Popen[bytes]" = child, goal: int = goal) -> bool:
            return child.poll() is not None or total_sent(site.hub) >= goal

        await asyncio.to_thread(wait_until, over)
        assert kill(child) == b""
        assert child.returncode == -signal.SIGKILL
        await assert_whole_or_absent(site)
    site.hub.rate = 0
    await finish(site)
    await site.files.delete_artifact("tiny", 1)
    assert await site.files.check({}, deep=True, repair=False) == ()
    assert (await site.files.use()).blob_count == 0


def test_what_a_journal_is_trusted_for() -> None:
    """After a crash what was written, after another boot what was synced, of another size nothing."""
    synced, written = Spans([(0, 40)]), Spans([(0, 60), (70, 90)])
    here = Journal(100, BOOT_ID, "m", synced, written)
    assert here.trusted(have=100, size=100) == written
    assert here.trusted(have=80, size=100) == Spans([(0, 60), (70, 80)])
    for boot in ("another boot", ""):
        journal = Journal(100, boot, "m", synced, written)
        assert journal.trusted(have=90, size=100) == synced
        assert journal.trusted(have=30, size=100) == Spans([(0, 30)])
        assert journal.trusted(have=90, size=101) == Spans()


GOOD = b'{"format":2,"size":100,"boot":"%b","model":"m","synced":"0-50"}' % BOOT_ID.encode()


@pytest.mark.parametrize(
    "journal",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'{"format":2}',
        GOOD.replace(b'"format":2', b'"format":1'),
        GOOD.replace(b"0-50", b"-1-50"),
        GOOD.replace(b"0-50", b"0-101"),
        GOOD.replace(b"0-50", b"50-0"),
        GOOD.replace(b":100", b':"100"'),
        GOOD.replace(b'"0-50"', b"50"),
        GOOD.replace(b'"m"', b"null"),
        GOOD + b"\n0-60\xff",
        b"[" * 4000,
        b" " * 9000,
    ],
    ids=[str(number) for number in range(15)],
)
def test_a_torn_or_foreign_journal_is_worth_nothing(tmp_path: Path, journal: bytes | None) -> None:
    """The part starts over."""
    home = Home(tmp_path / "home")
    parts = tmp_path / "home" / "staging" / "parts"
    (parts / "key.part").write_bytes(b"x" * 60)
    if journal is not None:
        (parts / "key.json").write_bytes(journal)
    assert kept_spans(home, "key", 100) == Spans()
    home.close()


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (b"\n0-55", [(0, 55)]),
        (b"\n0-20 30-55   ", [(0, 20), (30, 55)]),
        (b"\n0-5", [(0, 5)]),
        (b"\n0-55 30-", [(0, 50)]),
        (b"\n55-0", [(0, 50)]),
        (b"\ngarbage", [(0, 50)]),
        (b"\n0-55 58-99", [(0, 55), (58, 60)]),
    ],
)
def test_a_torn_second_line_costs_what_was_not_synced(
    tmp_path: Path, line: bytes, kept: list[tuple[int, int]]
) -> None:
    """What it says counts if it is whole, within what is on disk; else what the first line says."""
    home = Home(tmp_path / "home")
    parts = tmp_path / "home" / "staging" / "parts"
    (parts / "key.part").write_bytes(b"x" * 60)
    (parts / "key.json").write_bytes(GOOD + line)
    assert kept_spans(home, "key", 100) == Spans(kept)
    home.close()


async def test_a_journal_that_claims_more_than_there_is(site: Site, hub: LoopbackHub) -> None:
    """As after a power cut: zeros where the journal says bytes. The digest decides."""
    hub.fault(Fault(f"/{SHA256}", stall_after=1_000_000))
    child = start_child(site)
    await written(site, 1_000_000)
    kill(child)
    (part,) = [p for p in site.parts() if p.name.startswith(SHA256)]
    data = part.read_bytes()
    part.write_bytes(data[:500_000] + bytes(500_000))
    await finish(site)
    assert site.quarantined() == []


async def test_bytes_that_no_journal_speaks_of_are_nobodys(site: Site) -> None:
    """Without a journal nothing is kept; with one, what it names within the file's length."""
    part_file = site.home / "staging" / "parts" / f"{SHA256}.part"
    part_file.write_bytes(WEIGHTS + b"more")
    with site.store.open_part(SHA256, len(WEIGHTS), "tiny") as part:
        assert part.done_bytes == 0
        part.write(1000, memoryview(WEIGHTS)[1000:5000])
        part.write(0, memoryview(WEIGHTS)[:300])
    part_file.write_bytes(WEIGHTS + b"more")
    with site.store.open_part(SHA256, len(WEIGHTS), "tiny") as part:
        assert part.done == Spans([(0, 300), (1000, 5000)])
        assert part_file.stat().st_size == 5000
    fetched = await site.fetch()
    assert fetched.reused_bytes == 4300
    assert site.content() == FILES
