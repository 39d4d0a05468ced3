"""What holds for every test: nothing of the user's environment, nothing outside loopback."""

import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Read whenever hypothesis stores something: examples that failed belong to the other caches.
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(ROOT / ".cache" / "hypothesis")
# A deadline per example would be a timing assertion; the timeout per test bounds a hang. In CI the
# examples are the same in every run, so that a failure is the change's.
hypothesis.settings.register_profile(
    "modelhost",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# CONTRIBUTING.md says how: as many examples as an hour has room for, never the same ones twice.
hypothesis.settings.register_profile(
    "soak", hypothesis.settings.get_profile("modelhost"), max_examples=10_000, derandomize=False
)
hypothesis.settings.load_profile("modelhost")

# What would make a test depend on the machine: tokens, endpoints, proxies, the service manager.
_FOREIGN = (
    "HF_",
    "HUGGING_FACE_",
    "TRANSFORMERS_",
    "MODELHOST_",
    "NOTIFY_SOCKET",
    "WATCHDOG_",
    "JOURNAL_STREAM",
    "LISTEN_",
    "STATE_DIRECTORY",
    "CACHE_DIRECTORY",
    "RUNTIME_DIRECTORY",
    # Another size of a terminal than the one that a test opens; pytest-xdist sets them.
    "COLUMNS",
    "LINES",
    # Every daemon and worker that a test starts would compile all of its modules anew.
    "PYTHONDONTWRITEBYTECODE",
)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy", "no_grpc_proxy")


# A test's files are synced like a user's, and then nobody needs them: on a disk that is most of some
# tests' time. What a power cut leaves on one is tested on an image of its own (tests/kill).
_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 4 * 2**30
if (
    "TMPDIR" not in os.environ
    and os.access(_MEMORY, os.W_OK)
    and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES
):
    os.environ["TMPDIR"] = str(_MEMORY)
    tempfile.tempdir = None  # asked for anew


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files with the longest tests begin first, so that none of them is waited for at the end."""
    longest: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        allowed_s = float(mark.args[0] or "inf") if mark else 0.0
        longest[item.path] = max(longest.get(item.path, 0.0), allowed_s)
    items.sort(key=lambda item: -longest[item.path])


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the tests, and every process that they start, an environment of their own."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(_FOREIGN) or name.lower() in _PROXIES:
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_DATA_HOME", str(home / "data"))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        patch.setenv("HF_HOME", str(home / "hf"))
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        # Threads of torch beyond the cores that two test processes share only slow both down.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def _loopback_only(event: str, args: tuple[Any, ...]) -> None:
    if event != "socket.connect":
        return
    sock, address = args
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = address[0].partition("%")[0]
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise RuntimeError(f"a test tried to connect to {host}: tests talk to loopback only")


# A runner in the background of a shell ignores SIGINT, and so would every child that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.addaudithook(_loopback_only)
