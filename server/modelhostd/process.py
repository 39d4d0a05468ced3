"""Settings of the daemon's process that must be made before ``import grpc``: allocator, limits, loop.

Measured (bench/): glibc's defaults give every thread an arena and return large blocks to the kernel at
once, so that each 1 MiB message faults its pages again; the three ``mallopt`` values double the throughput
of large tensors. This module imports only the standard library.
"""

import asyncio
import ctypes
import faulthandler
import gc
import os
import resource
import sys
from collections.abc import Callable, MutableMapping

from modelhostd.core.values import dataclass

MIB = 2**20

# Numbers of <malloc.h>; glibc's ABI.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MALLOPT = (
    # 32 MiB is the most that glibc takes: up to it blocks come from the heap and are used again.
    ("M_MMAP_THRESHOLD", _M_MMAP_THRESHOLD, 32 * MIB),
    # What stays at the heap's end after a burst; `release_memory` gives it back when it is quiet.
    ("M_TRIM_THRESHOLD", _M_TRIM_THRESHOLD, 512 * MIB),
    ("M_ARENA_MAX", _M_ARENA_MAX, 1),
)

GRPC_EXPERIMENTS = "GRPC_EXPERIMENTS"
_LISTENER = "-event_engine_listener"
"""One thread hop less for each call. An experiment's flag: a newer grpcio may ignore it."""

UMASK = 0o077


@dataclass(frozen=True, slots=True)
class ProcessSetting:
    """One setting: its value, whether it acts, and why not."""

    setting: str
    value: str
    effective: bool
    message: str = ""


def prepare(environment: MutableMapping[str, str] = os.environ) -> tuple[ProcessSetting, ...]:
    """Make all settings, as the first thing that the process does; return what came of each."""
    faulthandler.enable()  # the watchdog's SIGABRT leaves every thread's stack in the log
    os.umask(UMASK)
    return (
        *_set_allocator(),
        _set_experiments(environment),
        _raise_descriptors(),
        ProcessSetting("umask", f"{UMASK:04o}", effective=True),
    )


def loop_factory(
    wanted: bool,
) -> tuple[Callable[[], asyncio.AbstractEventLoop] | None, ProcessSetting]:
    """Return what ``asyncio.Runner`` is to make loops with (None: asyncio's own), and the setting."""
    if not wanted:
        return None, ProcessSetting("uvloop", "off", effective=True)
    try:
        import uvloop
    except ImportError as error:
        return None, ProcessSetting("uvloop", "on", effective=False, message=str(error))
    return uvloop.new_event_loop, ProcessSetting("uvloop", "on", effective=True)


def begin_collecting() -> None:
    """Let the collector work, and spare it what is there by now: the start's objects stay for good."""
    gc.freeze()
    gc.enable()


def release_memory() -> bool:
    """Return freed memory to the kernel; True if any was. For quiet moments: it walks the heap."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except AttributeError:  # not glibc
        return False


def _set_allocator() -> list[ProcessSetting]:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        why = "the C library has no mallopt"
        return [ProcessSetting(name, str(value), effective=False, message=why)
                for name, _, value in _MALLOPT]  # fmt: skip
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    return [
        ProcessSetting(name, str(value), effective=True)
        if mallopt(parameter, value) == 1
        else ProcessSetting(name, str(value), effective=False, message="mallopt refused it")
        for name, parameter, value in _MALLOPT
    ]


def _set_experiments(environment: MutableMapping[str, str]) -> ProcessSetting:
    given = environment.get(GRPC_EXPERIMENTS)
    if given is not None:
        acts = _LISTENER in given.split(",")
        why = "" if acts else f"the environment sets it to {given!r}"
        return ProcessSetting(GRPC_EXPERIMENTS, _LISTENER, effective=acts, message=why)
    if "grpc" in sys.modules:
        why = "grpc was imported before"
        return ProcessSetting(GRPC_EXPERIMENTS, _LISTENER, effective=False, message=why)
    environment[GRPC_EXPERIMENTS] = _LISTENER
    return ProcessSetting(GRPC_EXPERIMENTS, _LISTENER, effective=True)


def _raise_descriptors() -> ProcessSetting:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        return ProcessSetting("RLIMIT_NOFILE", str(hard), effective=False, message=str(error))
    return ProcessSetting("RLIMIT_NOFILE", str(hard), effective=True)
