"""Kill, cut the power, send damaged messages and look, until the time is up: `make soak MINUTES=n`.

Goes on with the programs of ``tests/kill``, side by side, each time with another seed. Prints a line for
each run and the sums in the end; exits with 1 at the first finding, with the seed that it came with. A
seed makes equal choices again, not equal timing: go back to a finding with several runs of its seed.

    python bench/soak.py --minutes 60 --only kill_loop.py --seed 4711
"""

import argparse
import json
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only the folder of this file is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.kill import mounting, programs

RUN_S = 30.0
"""How long one seed goes on, and about how long the others still do after a finding."""
OVER_S = 300.0
"""A run that takes so much longer hangs: that is a finding too."""
ENOUGH = 1_000_000
LIVE = "../live/live_loop.py"
DAMAGE = "../hostile/mutation_loop.py"
PROGRAMS = ("kill_loop.py", "download_loop.py", "daemon_loop.py", "power_cut.py", LIVE, DAMAGE)
SUMS = {
    "kills": "kills",
    "at_failpoints": "of them at failpoints",
    "acknowledged": "acknowledged changes checked",
    "told": "events that clients were told, validated",
    "events": "events on disk, validated",
    "artifacts_seen": "artifacts on disk, hashed",
    "refused": "downloads with wrong bytes, refused",
    "steps": "random steps on live daemons, the books balanced at each rest",
    "messages": "damaged messages to live daemons, each answered in type",
    "resumed": "downloads gone on with in mid-file, to the byte",
}


@dataclass
class Soak:
    """All runs so far. ``finding`` is what the first broken promise says."""

    endpoint: str
    root: Path
    end: float
    seed: int
    finding: str = ""
    sums: dict[str, Counter[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def go_on(self, program: str) -> None:
        """Run one program with seed after seed until the time is up or anything was found."""
        number = 0
        while not self.finding and (left := self.end - time.monotonic()) > 0:
            seed = self.seed * 1000 + number
            number += 1
            seconds = min(RUN_S, left)
            place = self.root / f"{Path(program).stem.partition('_')[0]}{number}"
            place.mkdir()
            try:
                totals = programs.run(
                    program,
                    place / "it",
                    self.endpoint,
                    ENOUGH,
                    seed,
                    seconds,
                    timeout_s=seconds + OVER_S,
                )
            except Exception as error:
                mounting.take_out(place / "it" / "disk")
                self._found(f"{program}, seed {seed}: {error}")
                return
            finally:
                shutil.rmtree(place, ignore_errors=True)
            self._add(program, seed, totals)

    def _found(self, what: str) -> None:
        with self.lock:
            if not self.finding:
                self.finding = what

    def _add(self, program: str, seed: int, totals: dict[str, Any]) -> None:
        with self.lock:
            counts = {name: int(totals.get(name, 0)) for name in SUMS}
            self.sums.setdefault(program, Counter()).update(counts)
            print(f"{program} {seed}: {json.dumps(counts)}", flush=True)


def report(soak: Soak) -> None:
    """Print what was seen, by program and in all."""
    for name, words in SUMS.items():
        each = {program: counts[name] for program, counts in soak.sums.items()}
        parts = ", ".join(f"{program} {count:,}" for program, count in each.items())
        print(f"{sum(each.values()):>12,} {words} ({parts})")


def main() -> int:
    """Soak for the time asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Kill and look until the time is up.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--only", choices=PROGRAMS, action="append", help="default: all of them")
    args = parser.parse_args()
    wanted = args.only or list(PROGRAMS)
    print(f"soak: {args.minutes:g} min, seed {args.seed}", flush=True)
    with programs.memory() as root, programs.serving() as hub:
        if "power_cut.py" in wanted and (why := mounting.why_not(root)):
            print(f"no power cuts: {why}")
            wanted.remove("power_cut.py")
        soak = Soak(hub.endpoint, root, time.monotonic() + args.minutes * 60, args.seed)
        with ThreadPoolExecutor(len(PROGRAMS)) as pool:
            list(pool.map(soak.go_on, wanted))
    report(soak)
    if soak.finding:
        print(f"FOUND: {soak.finding}", file=sys.stderr)
        return 1
    print("nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
