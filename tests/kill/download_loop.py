"""A program: a child that downloads and deletes a file of megabytes, killed at any moment, again and again.

``python download_loop.py HOME ENDPOINT KILLS SEED [SECONDS]`` prints one JSON object of totals; it raises at the
first broken promise, naming seed and round. It has one thread, so that it may fork. The loopback hub at
ENDPOINT, which serves ``programs.LARGE``, is somebody else's.
"""

import asyncio
import hashlib
import json
import math
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from modelhostd.adapters import failpoints
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.downloads import HubDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.hub import HubConfig
from modelhostd.adapters.layout import Home, blob_at
from modelhostd.adapters.parts import kept_spans
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.resources import Source
from modelhostd.ports import DownloadJob
from tests.adapters.downloads_support import RANGED
from tests.kill import programs
from tests.kill.kill_loop import prepare
from tests.kill.look import expect
from tests.support import readable

WEIGHTS = "model.safetensors"
POINTS = [name for name in failpoints.NAMES if not name.startswith("database.")]
LOOK_EVERY = 10
"""Rounds after which a child recovers and everything is looked through."""
LIFE_S = 150.0
MOMENTS_S = (0.06, 0.3)
"""The kill comes at most so long after the child has begun its work: in a first download, or a later one."""
MIDDLES, ENDS = 0.3, 0.25
"""How often it comes so long after a part of the first download, and after its end, however slow the machine is."""
BEGUN = b"begun\n"


@dataclass
class Totals:
    """What a run has seen."""

    seed: int
    kills: int = 0
    at_failpoints: int = 0
    in_mid_file: int = 0
    """Kills that left a part with some of its bytes."""
    resumed: int = 0
    """Downloads that went on from such a part and came to their end."""
    resumed_bytes: int = 0
    whole: int = 0
    """Kills that left the model visible."""
    cpu_s: float = 0.0


class DownloadLoop:
    """One home, in which children work and die."""

    def __init__(self, root: Path, endpoint: str, seed: int) -> None:
        self._path = root
        self._endpoint = endpoint
        self._home = Home(root)
        self._weights = programs.large()[WEIGHTS]
        self._sha256 = hashlib.sha256(self._weights).hexdigest()
        self.totals = Totals(seed)

    def run(self, kills: int, seconds: float = math.inf) -> None:
        """Kill so many children, or for so long; raises ViolationError."""
        number, end = 0, time.monotonic() + seconds
        while self.totals.kills < kills and time.monotonic() < end:
            number += 1
            chance = random.Random(f"{self.totals.seed}/{number}")
            point = f"{chance.choice(POINTS)}=kill@{chance.randrange(1, 9)}"
            point = point if chance.random() < 0.4 else ""
            try:
                self._round(chance, point)
                if number % LOOK_EVERY == 0:
                    self._in_peace("look")
            except BaseException as error:
                error.add_note(
                    f"seed {self.totals.seed}, round {number}, {point or 'no failpoint'}"
                )
                raise
        self._in_peace("finish")

    def _round(self, chance: random.Random, point: str) -> None:
        kept = self.kept_bytes()
        child, said = self._spawn(chance.choice(["whole", "ranged"]), point)
        end = time.monotonic() + LIFE_S
        begun = readable(said, timeout_s=LIFE_S)
        expect(bool(begun), "a child does not begin")
        os.read(said, len(BEGUN))
        which = chance.random()
        wanted = chance.randrange(len(self._weights)) if which < MIDDLES else len(self._weights)
        while not point and which < MIDDLES + ENDS and time.monotonic() < end:
            if readable(said, timeout_s=0.001) or self._written_bytes() > wanted:
                break
        moment = chance.random() * chance.choice(MOMENTS_S)
        # Also what ends of its failpoint ends the pipe; what it says meanwhile is read below.
        while point and time.monotonic() < end and not _over(child):
            select.select([], [], [], 0.002)
        if not point:
            select.select([], [], [], moment)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        with os.fdopen(said, "rb") as pipe:
            lines = [json.loads(line) for line in pipe.read().splitlines()]
        expect(ended == -signal.SIGKILL, f"the child ended by itself with {ended}")
        self.totals.kills += 1
        self.totals.at_failpoints += bool(point) and time.monotonic() < end
        # What a first download did not fetch is what was there, to the byte.
        if lines and kept is not None:
            reused = lines[0]["reused"]
            expect(reused == kept, f"{kept} bytes were there, {reused} were taken")
            if 0 < kept < len(self._weights):
                self.totals.resumed += 1
                self.totals.resumed_bytes += kept
        self.look()

    def kept_bytes(self) -> int | None:
        """Return how many bytes of the weights a download goes on from.

        None where a deletion was cut off: it is finished first, unless a download needs the file.
        """
        if any((self._path / "staging" / "trash").iterdir()):
            return None
        verified = self._path / "staging" / "verified" / self._sha256
        if verified.exists() or self._home.stat(blob_at(self._sha256)) is not None:
            return len(self._weights)
        return kept_spans(self._home, self._sha256, len(self._weights)).total

    def _written_bytes(self) -> int:
        """Return how many bytes of the disk a part of the weights has."""
        try:
            part = self._path / "staging" / "parts" / f"{self._sha256}.part"
            return part.stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def look(self) -> None:
        """Hold what the kill left against what it may: all of a model or nothing, and no wrong byte."""
        trees = sorted(self._path.glob("models/*/*"))
        expect(trees in ([], [self._path / "models" / "large" / "1"]), f"visible: {trees}")
        for tree in trees:
            files = sorted(path for path in (tree / "files").rglob("*") if path.is_file())
            expect([path.name for path in files] == [WEIGHTS], f"half a model is visible: {files}")
            expect(files[0].read_bytes() == self._weights, "a visible file has wrong bytes")
            expect((tree / "manifest.json").is_file(), "a visible model has no manifest")
            self.totals.whole += 1
        spans = kept_spans(self._home, self._sha256, len(self._weights))
        self.totals.in_mid_file += 0 < spans.total < len(self._weights)
        if spans.total:
            part = (self._path / "staging" / "parts" / f"{self._sha256}.part").read_bytes()
            for start, end in spans:
                right = part[start:end] == self._weights[start:end]
                expect(right, f"the journal claims wrong bytes in {start}-{end}")

    def _in_peace(self, what: str) -> None:
        """Have a child recover, look through everything, or bring it to its end, and end by itself."""
        child, said = self._spawn(what, "")
        with os.fdopen(said, "rb") as pipe:
            pipe.read()
        _, status = os.waitpid(child, 0)
        expect(os.waitstatus_to_exitcode(status) == 0, f"{what}: a child found what must not be")

    def _spawn(self, how: str, point: str) -> tuple[int, int]:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            code = 1
            try:
                failpoints.configure(point)
                asyncio.run(live(self._path, self._endpoint, how, writing))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        return pid, reading


def _over(pid: int) -> bool:
    """Tell whether a child has ended, and leave it to be reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


async def live(home: Path, endpoint: str, how: str, said: int) -> None:
    """One life of the child: recover as the daemon does, then download and delete for ever."""
    store = BlobStore(StoreConfig(home, sync_bytes=256 << 10, reserve_bytes=0))
    trees = TreeStore(store)
    files = FileStore(store, trees)
    streams = RANGED if how == "ranged" else None
    downloads = HubDownloads(HubConfig(endpoint=endpoint), store, trees, streams=streams)
    await files.recover()
    os.write(said, BEGUN)
    shown = await files.on_disk(["large"])
    if how == "look":
        found = await files.check(shown, deep=True, repair=False)
        assert found == (), found
        return
    while True:
        job = DownloadJob("op", "large", 1, Source(f"hf://{programs.LARGE}"), {})
        fetched = await downloads.fetch(job, lambda _: None)
        os.write(said, json.dumps({"reused": fetched.reused_bytes}).encode() + b"\n")
        found = await files.check({"large": [1]}, deep=True, repair=False)
        assert found == (), found
        await files.delete_artifact("large", 1)
        if how == "finish":
            use = await files.use()
            left = (use.blob_count, use.staging_bytes, use.quarantine_bytes)
            assert left == (0, 0, 0), use
            return


def main(root: Path, endpoint: str, kills: int, seed: int, seconds: float = math.inf) -> None:
    """Run the loop and print what it saw."""
    prepare()
    loop = DownloadLoop(root, endpoint, seed)
    loop.run(kills, seconds)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    loop.totals.cpu_s = round(usage.ru_utime + usage.ru_stime, 1)
    print(json.dumps(asdict(loop.totals)))


if __name__ == "__main__":
    place, hub, count, number, *limit = sys.argv[1:]
    main(Path(place), hub, int(count), int(number), *map(float, limit))
