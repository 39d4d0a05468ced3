"""Torch's threads on the CPU: one thread of a worker has them, in all others torch computes alone.

Each thread that runs torch on the CPU gets an OpenMP team of its own. Once all teams together have more threads than there
are cores, libgomp's threads sleep at every barrier instead of looking at it for a while: 146 times in a pass of MiniLM
through one of several teams, 3 times where there is one. On idle cores passes are a third faster with one; where
other programs want the cores as well they are many times slower, each thread looking while the other one does not run
(bench/RESULTS.md). So the thread that has the team sees how long it waits for a core, and has its threads sleep then.
"""

import contextlib
import os
import sys
import threading
from typing import Any

SPINS = "10000"
"""How often a thread looks at a barrier before it sleeps, unless the operator says otherwise: for 0.25 ms, where one
operator of a model takes 0.1 to 0.2. libgomp's own 300,000 are 7 ms, for which a core is held up after every pass."""
LOOK_NS = 100_000_000
"""Of work, after which it is asked how much of it was waiting for a core."""
CROWDED = 0.2
"""Part of the work: where more was waiting for a core its threads sleep at barriers for a while."""
FIRST_REST, MOST_REST = 50, 800
"""For so many looks: longer each time that it was crowded at once when they no longer slept."""
PARALLEL_ELEMENTS = 2**20
BEGIN_S = 5.0


def one_team(device: str) -> int:
    """Return the threads of the one team that models on ``device`` compute with; 0 = they compute elsewhere.

    To be called before torch is imported: OpenMP reads its environment then.
    """
    if device.startswith("cuda"):
        return 0
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    os.environ["OMP_NUM_THREADS"] = "1"
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    return int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))


def take_team(threads: int) -> None:
    """Have torch compute with so many threads where this thread calls it, and nowhere else."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_num_threads(threads)
    # The first question has a thread take the number that was set last by any: from here on it has its own.
    torch.get_num_threads()
    others = threading.Thread(target=torch.set_num_threads, args=(1,), name="team")
    others.start()
    others.join()


class Team:
    """The threads of the thread that computes: whether they look at barriers or sleep. For that thread alone."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.sleeps = False
        """Whether its threads sleep at barriers."""
        self._taken = False
        self._worked_ns = 0
        self._waited_ns = 0
        self._rest = FIRST_REST
        self._left = 0
        self._extra: threading.Event | None = None

    def take(self) -> None:
        """Have this thread compute with the team, once torch is there."""
        if not self._taken and "torch" in sys.modules:
            name_thread("compute")
            take_team(self.threads)
            self._waited_ns = waited_ns()
            self._taken = True

    def worked(self, worked_ns: int) -> None:
        """Count work that this thread did; now and then decide how its team waits."""
        self._worked_ns += worked_ns
        if self._worked_ns < LOOK_NS or self.threads < 2:
            return
        waited, self._waited_ns = self._waited_ns, waited_ns()
        self.decide((self._waited_ns - waited) / self._worked_ns)
        self._worked_ns = 0

    def decide(self, share: float) -> None:
        """Have the team sleep or not, after so much of the work since the last look was waiting for a core.

        How long it waits while its threads sleep says little of what it would otherwise: from time to time it is tried.
        """
        if self.sleeps:
            self._left -= 1
            if not self._left and self._extra is not None:
                self._extra.set()
                self._extra, self.sleeps = None, False
        elif share <= CROWDED:
            self._rest = FIRST_REST
        else:
            begun, end = threading.Event(), threading.Event()
            extra = max(2, len(os.sched_getaffinity(0)) - self.threads + 2)
            try:
                threading.Thread(
                    target=_hold_team, args=(extra, begun, end), name="idle-team", daemon=True
                ).start()
            except RuntimeError:  # The system gives no thread.
                return
            begun.wait(BEGIN_S)
            self._extra, self.sleeps = end, True
            self._left, self._rest = self._rest, min(2 * self._rest, MOST_REST)


def _hold_team(threads: int, begun: threading.Event, end: threading.Event) -> None:
    """Have a team that does nothing: with it there are more threads than cores, and libgomp's sleep at barriers.

    It goes by that number alone, and has no other switch once it runs.
    """
    name_thread("idle-team")
    torch: Any = sys.modules["torch"]
    take_team(threads)
    torch.ones(PARALLEL_ELEMENTS).add_(1)
    begun.set()
    end.wait()


def name_thread(name: str) -> None:
    """Name this thread for the system, and the threads of its team with it."""
    with (
        contextlib.suppress(OSError),
        open("/proc/thread-self/comm", "w", encoding="ascii") as file,
    ):
        file.write(name)


def waited_ns() -> int:
    """Return how long this thread was ready to run and had no core, since it began; 0 where the kernel does not tell.

    https://docs.kernel.org/scheduler/sched-stats.html
    """
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
