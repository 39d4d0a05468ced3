"""A program: live, be killed, look at what is left, again.

``python kill_loop.py HOME ENDPOINT KILLS SEED [SECONDS]`` prints one JSON object of totals; it raises at the first
broken promise, naming seed and round. It has one thread, so that it may fork: a fresh interpreter for
each child would take most of the time. The loopback hub at ENDPOINT is somebody else's.
"""

import gc
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog

from modelhostd.adapters import failpoints, hub_library
from modelhostd.adapters.fsck import run_fsck
from tests.kill import recording
from tests.kill.chronicle import Chronicle
from tests.kill.look import Disk, expect
from tests.kill.plan import Plan
from tests.kill.scenario import live
from tests.support import readable

LIFE_S = 200.0
"""No life lasts so long; one that does hangs."""
PULSES_MAX = 20
CALM_EVERY, CALM_FIRST = 25, 5
POINTS = [name for name in failpoints.NAMES if "migration" not in name]


@dataclass
class Totals:
    """What a run has seen."""

    seed: int
    kills: int = 0
    at_failpoints: int = 0
    calm: int = 0
    events: int = 0
    acknowledged: int = 0
    told: int = 0
    artifacts_seen: int = 0
    refused: int = 0
    """Downloads whose bytes were not what was announced."""
    seconds: float = 0.0
    points: dict[str, int] = field(default_factory=dict)


class Loop:
    """One home, killed again and again."""

    def __init__(self, home: Path, endpoint: str, seed: int) -> None:
        self._home = home
        self._endpoint = endpoint
        self._seed = seed
        self._disk = Disk(home)
        self._record = home.with_name(f"{home.name}.record")
        self.chronicle = Chronicle()
        self.totals = Totals(seed)

    def run(self, kills: int, seconds: float = math.inf) -> None:
        """Kill so many children, or for so long; raises ViolationError."""
        began = time.monotonic()
        number = 0
        while self.totals.kills < kills and time.monotonic() < began + seconds:
            number += 1
            self._round(number, calm=number % CALM_EVERY == CALM_FIRST)
        self._round(number + 1, calm=True)
        self.chronicle.check_all()
        self.totals.events = len(self.chronicle.events)
        self.totals.acknowledged = self.chronicle.acknowledged
        self.totals.told = self.chronicle.told
        self.totals.artifacts_seen = self._disk.artifacts_seen
        self.totals.refused = self.chronicle.refused
        self.totals.seconds = round(time.monotonic() - began, 1)

    def _round(self, number: int, *, calm: bool) -> None:
        seed = f"{self._seed}/{number}"
        chance = random.Random(f"killer {seed}")
        starts = {w.name: self.chronicle.position(w.name) + 1 for w in recording.WATCHERS}
        plan = Plan(
            number,
            seed,
            self._home,
            self._endpoint,
            starts,
            calm,
            self.chronicle.request,
            boot=self.boot(number),
        )
        point = "" if calm or chance.random() < 0.5 else _armed(chance)
        try:
            self._record.unlink(missing_ok=True)
            child, pulses = _spawn(plan, self._record, point)
            ended, by_itself = _kill(child, pulses, chance, calm=calm, point=point)
            if not calm:
                self.cut_off()
            if calm:
                expect(ended == 0, f"a calm life ended with {ended}")
                self.totals.calm += 1
            else:
                expect(ended == -signal.SIGKILL, f"the child ended by itself with {ended}")
                self.totals.kills += 1
                if by_itself:
                    self.totals.at_failpoints += 1
                    name = point.partition("=")[0]
                    self.totals.points[name] = self.totals.points.get(name, 0) + 1
            self._disk.look(self.chronicle, recording.read(self._record), thorough=calm)
            if calm:
                clean = _in_child(lambda: _fsck(self._home))
                expect(clean == "", f"fsck after a restart: {clean}")
        except BaseException as error:
            error.add_note(f"seed {self._seed}, round {number}, failpoint {point or 'none'}")
            raise

    def boot(self, number: int) -> str:
        """Return the name of the boot that a life belongs to; empty: this one."""
        return ""

    def cut_off(self) -> None:
        """Take away what the machine would lose: with a kill alone, nothing."""


def _fsck(home: Path) -> str:
    outcome = run_fsck(home, deep=True)
    return "" if not outcome.findings else json.dumps([asdict(f) for f in outcome.findings])


def _armed(chance: random.Random) -> str:
    return f"{chance.choice(POINTS)}=kill@{chance.choice((1, 1, 1, 2, 3, 5, 8))}"


# --- children ---------------------------------------------------------------------------------------


def _spawn(plan: Plan, record: Path, point: str) -> tuple[int, int]:
    """Start a life; return its pid and the pipe of its pulses."""
    reading, writing = os.pipe()
    # What is here already is nobody's garbage: a collection in the child would copy all of its pages.
    gc.freeze()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        try:
            failpoints.configure(point)
            live(plan, record, writing)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    return pid, reading


def _kill(
    child: int, pulses: int, chance: random.Random, *, calm: bool, point: str
) -> tuple[int, bool]:
    """Wait for the child's moment, kill it there; return how it ended, and whether by its failpoint."""
    end = time.monotonic() + LIFE_S
    wanted = PULSES_MAX if point else chance.choice((0, chance.randint(1, PULSES_MAX)))
    pause_s = chance.random() * 0.006
    gone = False
    while (calm or wanted > 0) and time.monotonic() < end:
        heard = readable(pulses, timeout_s=end - time.monotonic())
        found = len(os.read(pulses, wanted if not calm else 4096)) if heard else 0
        if not found:
            gone = True
            break
        wanted -= found
    if not calm and not gone:
        select.select([], [], [], pause_s)
        os.kill(child, signal.SIGKILL)
    elif time.monotonic() >= end:
        os.kill(child, signal.SIGABRT)
    _, status = os.waitpid(child, 0)
    os.close(pulses)
    return os.waitstatus_to_exitcode(status), gone and not calm


def _in_child(work: Callable[[], str]) -> str:
    """Return the text that ``work`` gives in a child: it may start threads there."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        text = "it raised"
        try:
            text = work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, text.encode()[:60_000])
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


def prepare() -> None:
    """Make this process fit to fork lives."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(40),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # What the children would otherwise import one by one, each for itself.
    hub_library.library().HfApi()
    hub_library.invalid_url()
    assert len(os.listdir("/proc/self/task")) == 1, "a program with threads must not fork"


def report(loop: Loop) -> None:
    """Print what a loop has seen."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({**asdict(loop.totals), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1)}))


def main(home: Path, endpoint: str, kills: int, seed: int, seconds: float = math.inf) -> None:
    """Run the loop and print what it saw."""
    prepare()
    loop = Loop(home, endpoint, seed)
    loop.run(kills, seconds)
    report(loop)


if __name__ == "__main__":
    place, hub, count, number, *limit = sys.argv[1:]
    main(Path(place), hub, int(count), int(number), *map(float, limit))
