"""What a worker does to its own process before anything else runs in it. Linux only."""

import ctypes
import faulthandler
import gc
import os
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

MIB = 2**20


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; check it still lives.

    The check comes after the request: a daemon that died in between would never send the signal.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(0)


def report_crashes() -> None:
    """Write all threads' stacks to standard error on a fatal signal, and on SIGUSR1 go on after it."""
    faulthandler.enable(sys.stderr, all_threads=True)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True, chain=False)
    # A core dump of gigabytes of weights would hold up the replacement for seconds.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # An interrupt from the terminal reaches the whole group; when to end is the daemon's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prefer_as_victim() -> None:
    """Have the kernel take a worker rather than the daemon when memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("500")
    except OSError as error:
        sys.stderr.write(f"oom_score_adj was not set: {error}\n")


def keep_heap() -> None:
    """Have malloc keep what it has: large messages would else fault their pages in each time.

    One arena (as in the daemon) would cost torch's threads more than it saves, so only thresholds.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
    libc.mallopt(M_TRIM_THRESHOLD, 64 * MIB)


def give_back_heap() -> None:
    """Return freed memory to the system: after an unload it counts as free, so it must be."""
    ctypes.CDLL(None).malloc_trim(0)


_spare: list[Callable[[], object]] = []


def drops_when_short(drop: Callable[[], object]) -> None:
    """Have ``drop`` called where memory was short: it lets go of what is kept only to be faster."""
    _spare.append(drop)


def drop_spare() -> None:
    """Let go of all that is kept only to be faster."""
    for drop in _spare:
        drop()


def free_memory(*, thorough: bool = True, looking: bool = True) -> None:
    """Return what was dropped to the system, so that the ledger's figure is the true one.

    ``thorough``: what is in cycles among what :func:`importing` put aside, too. ``looking``: whether anything can be in cycles at
    all: that is asked of each object that there is, half a millisecond for each model of this worker, in which no request runs.
    """
    if thorough:
        collect()
    elif looking:
        gc.collect()
    give_back_heap()


def collect() -> None:
    """Free what is in cycles, wherever it is. Holds the interpreter up: 80 ms and more with transformers."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def importing(what: Callable[[], Result]) -> Result:
    """Return what is returned by what imports modules; the collector leaves these alone from then on.

    Else each full collection would look at all of them. In a thread of its own: failed imports leave cycles behind which
    hold the frames of who imported, and what these hold.
    """
    known = len(sys.modules)
    gc.disable()
    try:
        with ThreadPoolExecutor(1, "import") as apart:
            return apart.submit(what).result()
    finally:
        gc.enable()
        if len(sys.modules) != known:
            gc.freeze()


def share_interpreter() -> None:
    """Let waiting threads run after 0.5 ms: a load's Python code must not hold up inference."""
    sys.setswitchinterval(0.0005)
