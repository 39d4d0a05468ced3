"""A program: a whole daemon with its workers is killed in the middle of traffic, again and again.

``python daemon_loop.py ROOT ENDPOINT KILLS SEED [SECONDS]`` prints one JSON object of totals; it raises at the first
broken promise, naming seed and round. ROOT must be a short path: sockets lie below it.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import process_use
from modelhostd.adapters import failpoints
from tests.e2e import process
from tests.e2e.process import Daemon, DaemonFailed
from tests.kill import recording
from tests.kill.chronicle import Chronicle
from tests.kill.look import Disk, expect
from tests.kill.traffic import Traffic, unfinished_ended
from tests.support import wait_until

CALM_EVERY = 10
LIVES_S = (0.1, 0.4, 1.0)
"""How long a daemon may serve at most before its kill, the first two often before its worker is ready."""
SERVED_S = 6.0
STARTING_S = 0.7
READY_S = 120.0
"""A start that takes longer hangs; several run side by side here, on machines that are busy anyway."""
FAILPOINT_S = 1.5
FLAGS = (
    "--set", "worker.backends=identity",
    "--set", "worker.arena_bytes=1MiB",
    "--set", "shutdown.drain_timeout_s=1",
    "--log-level", "warning",
)  # fmt: skip
POINTS = [name for name in failpoints.NAMES if "migration" not in name]


@dataclass
class Totals:
    """What a run has seen."""

    seed: int
    kills: int = 0
    at_failpoints: int = 0
    before_ready: int = 0
    calm: int = 0
    calls: int = 0
    answers: int = 0
    workers_seen: int = 0
    events: int = 0
    acknowledged: int = 0
    told: int = 0
    artifacts_seen: int = 0
    refused: int = 0
    """Downloads whose bytes were not what was announced."""
    seconds: float = 0.0
    points: dict[str, int] = field(default_factory=dict)


class DaemonLoop:
    """One home, whose daemon is killed again and again."""

    def __init__(self, root: Path, endpoint: str, seed: int) -> None:
        self._root = root
        self._endpoint = endpoint
        self._seed = seed
        self._disk = Disk(root / "home")
        self._record = root / "record"
        self.chronicle = Chronicle()
        self.totals = Totals(seed)

    async def run(self, kills: int, seconds: float = math.inf) -> None:
        """Kill so many daemons, or for so long; raises ViolationError."""
        began = time.monotonic()
        number = 0
        while self.totals.kills < kills and time.monotonic() < began + seconds:
            number += 1
            await self._round(number, calm=number % CALM_EVERY == 0)
        await self._round(number + 1, calm=True)
        self.chronicle.check_all()
        self.totals.events = len(self.chronicle.events)
        self.totals.acknowledged = self.chronicle.acknowledged
        self.totals.told = self.chronicle.told
        self.totals.artifacts_seen = self._disk.artifacts_seen
        self.totals.refused = self.chronicle.refused
        self.totals.seconds = round(time.monotonic() - began, 1)

    async def _round(self, number: int, *, calm: bool) -> None:
        chance = random.Random(f"killer {self._seed}/{number}")
        point = ""
        if not calm and chance.random() < 0.3:
            point = f"{chance.choice(POINTS)}=kill@{chance.choice((1, 1, 2, 3))}"
        daemon = Daemon(
            self._root, FLAGS, {"HF_ENDPOINT": self._endpoint, failpoints.VARIABLE: point}
        )
        try:
            self._record.unlink(missing_ok=True)
            if calm:
                await self._rest(daemon)
            else:
                await self._kill(daemon, number, chance, point)
            self._disk.look(self.chronicle, recording.read(self._record), thorough=calm)
            if calm:
                _fsck(daemon.home)
        except BaseException as error:
            error.add_note(f"seed {self._seed}, round {number}, failpoint {point or 'none'}")
            error.add_note(daemon.log[-3000:] if (daemon.root / "log").exists() else "no log")
            raise
        finally:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.kill()

    async def _rest(self, daemon: Daemon) -> None:
        """Let a daemon take up what the last one left, and end it in peace."""
        await asyncio.to_thread(daemon.start)
        await unfinished_ended(daemon.target)
        code = await asyncio.to_thread(daemon.stop)
        expect(code == 0, f"SIGTERM ended a calm daemon with {code}")
        self.totals.calm += 1

    async def _kill(self, daemon: Daemon, number: int, chance: random.Random, point: str) -> None:
        workers: set[int] = set()
        if not point and chance.random() < 0.15:
            process = daemon.spawn()
            await asyncio.to_thread(_wait_for_end, process, chance.random() * STARTING_S)
            self.totals.before_ready += 1
        else:
            with contextlib.suppress(DaemonFailed) if point else contextlib.nullcontext():
                await asyncio.to_thread(daemon.start)
                await self._live(daemon, number, chance, point)
        assert daemon.process is not None
        if daemon.process.poll() is None:
            workers = {*process_use.children(daemon.pid)}
            daemon.process.kill()
        else:
            expect(bool(point), f"the daemon ended by itself with {daemon.process.returncode}")
            self.totals.at_failpoints += 1
            name = point.partition("=")[0]
            self.totals.points[name] = self.totals.points.get(name, 0) + 1
        ended = await asyncio.to_thread(daemon.process.wait, 30)
        expect(ended == -9, f"the daemon ended by itself with {ended}")
        if self._traffic is not None:
            # They go on until the daemon is gone, and note all that it had still sent.
            traffic, self._traffic = self._traffic, None
            async with asyncio.timeout(60):
                await traffic
        self.totals.kills += 1
        self.totals.workers_seen += len(workers)
        wait_until(
            lambda: not any(map(process_use.running, workers)),
            what="workers of a killed daemon are gone",
        )

    _traffic: "asyncio.Future[None] | None" = None

    async def _live(self, daemon: Daemon, number: int, chance: random.Random, point: str) -> None:
        """Make traffic until it is time for the kill, or the daemon has died of its failpoint."""
        starts = {w.name: self.chronicle.position(w.name) + 1 for w in recording.WATCHERS}
        traffic = Traffic(
            daemon.target,
            daemon.admin,
            recording.Recorder(self._record),
            number=number,
            seed=f"{self._seed}/{number}",
            starts=starts,
            wanted=chance.randint(1, 4),
        )

        async def all_of_it() -> None:
            await traffic.run()
            self.totals.calls += traffic.calls
            self.totals.answers += traffic.answers

        self._traffic = asyncio.ensure_future(all_of_it())
        served = asyncio.ensure_future(traffic.answered.wait())
        ends: set[asyncio.Future[Any]] = {self._traffic}
        if point:
            life_s = FAILPOINT_S
        elif chance.random() < 0.5:
            life_s = chance.random() * chance.choice(LIVES_S)
        else:
            # However slow the machine is: until models were downloaded, loaded and asked.
            ends, life_s = {*ends, served}, SERVED_S
        await asyncio.wait(ends, timeout=life_s, return_when=asyncio.FIRST_COMPLETED)
        served.cancel()


def _wait_for_end(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)


def _fsck(home: Path) -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "modelhostd", "fsck", "--home", str(home), "--deep"],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    expect(checked.returncode == 0, f"fsck after a restart: {checked.stdout}{checked.stderr}")


def main(root: Path, endpoint: str, kills: int, seed: int, seconds: float = math.inf) -> None:
    """Run the loop and print what it saw."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    process.START_S = READY_S
    loop = DaemonLoop(root, endpoint, seed)
    asyncio.run(loop.run(kills, seconds))
    print(json.dumps(asdict(loop.totals)))


if __name__ == "__main__":
    place, hub, count, number, *limit = sys.argv[1:]
    main(Path(place), hub, int(count), int(number), *map(float, limit))
