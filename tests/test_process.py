"""Settings of the process, each looked at in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelhostd import process

ROOT = Path(__file__).resolve().parent.parent


def prepared(before: str = "", after: str = "", **environment: str) -> dict[str, Any]:
    """Prepare a fresh process; return its settings by name, with whether each acts."""
    program = (
        f"{before}\n"
        "import json, os, resource, sys\n"
        "from modelhostd import process\n"
        "settings = {s.setting: [s.effective, s.message] for s in process.prepare()}\n"
        f"{after}\n"
        "print(json.dumps(settings))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT / "server"), **environment},
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_setting_acts_on_a_fresh_process() -> None:
    """On Linux with glibc all settings take effect, before grpc is imported."""
    after = (
        "assert os.environ['GRPC_EXPERIMENTS'] == '-event_engine_listener'\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "assert soft == hard\n"
        "assert os.umask(0) == 0o077\n"
        "assert 'grpc' not in sys.modules\n"
    )
    settings = prepared(after=after)
    assert set(settings) == {
        *("M_MMAP_THRESHOLD", "M_TRIM_THRESHOLD", "M_ARENA_MAX"),
        *("GRPC_EXPERIMENTS", "RLIMIT_NOFILE", "umask"),
    }
    assert all(effective for effective, _ in settings.values()), settings


def test_the_allocator_keeps_large_blocks() -> None:
    """After prepare a block of 8 MiB comes from the heap, and again from the same pages."""
    after = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p; libc.malloc.argtypes = [ctypes.c_size_t]\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "block = libc.malloc(8 << 20)\n"
        "heap = [l.split()[0] for l in open('/proc/self/maps') if '[heap]' in l][0].split('-')\n"
        "settings['heap'] = [int(heap[0], 16) <= block < int(heap[1], 16), '']\n"
        "libc.free(block)\n"
        "settings['again'] = [libc.malloc(8 << 20) == block, '']\n"
    )
    settings = prepared(after=after)
    assert settings["heap"][0]
    assert settings["again"][0]


def test_a_setting_that_comes_too_late_says_so() -> None:
    """After grpc was imported, or where the environment decides, the report says why."""
    late = prepared(before="import sys, types; sys.modules['grpc'] = types.ModuleType('grpc')")
    assert late["GRPC_EXPERIMENTS"] == [False, "grpc was imported before"]
    given = prepared(GRPC_EXPERIMENTS="other")
    assert given["GRPC_EXPERIMENTS"][0] is False
    assert "'other'" in given["GRPC_EXPERIMENTS"][1]
    same = prepared(GRPC_EXPERIMENTS="other,-event_engine_listener")
    assert same["GRPC_EXPERIMENTS"] == [True, ""]


def test_a_c_library_without_mallopt_is_no_failure() -> None:
    """On another C library the daemon starts, and the report says what does not act."""
    before = "import ctypes\nclass Other:\n    def __init__(self, *_): pass\nctypes.CDLL = Other\n"
    settings = prepared(before=before, after="assert not process.release_memory()")
    assert settings["M_ARENA_MAX"] == [False, "the C library has no mallopt"]
    assert settings["umask"][0]


def test_the_faster_loop_can_be_switched_off() -> None:
    """uvloop where it is wanted and installed, asyncio's own loop otherwise."""
    factory, setting = process.loop_factory(wanted=False)
    assert factory is None
    assert (setting.setting, setting.value, setting.effective) == ("uvloop", "off", True)
    pytest.importorskip("uvloop")
    factory, setting = process.loop_factory(wanted=True)
    assert setting.effective
    assert factory is not None
    loop = factory()
    assert type(loop).__module__.startswith("uvloop")
    loop.close()


def test_a_missing_uvloop_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it asyncio's loop serves, and the report says what is missing."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    factory, setting = process.loop_factory(wanted=True)
    assert factory is None
    assert not setting.effective
    assert "uvloop" in setting.message


def test_the_collector_works_from_ready_on() -> None:
    """What the start left is spared, and what comes after it is collected; an end before READY leaves it on."""
    prepared(
        before="import gc; gc.disable()",
        after="process.begin_collecting(); assert gc.isenabled() and gc.get_freeze_count() > 1000",
    )
    prepared(
        after=(
            "import gc\nfrom modelhostd.__main__ import main\n"
            "try:\n    main(['--no-such-flag'])\nexcept SystemExit:\n    pass\n"
            "assert gc.isenabled()"
        )
    )
