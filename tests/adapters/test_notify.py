"""What the service manager is told."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelhostd.adapters.notify import Notifier


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(60)
        self.socket.bind(address)

    def heard(self) -> list[str]:
        """Return the lines of the next message."""
        return self.socket.recv(4096).decode().splitlines()


@pytest.fixture(params=["path", "abstract"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Manager, Notifier]]:
    """Yield a manager and a notifier that talks to it."""
    name = f"modelhost-test-{os.getpid()}-{tmp_path.name}"
    address = "@" + name if request.param == "abstract" else str(tmp_path / "n")
    manager = Manager(address.replace("@", "\0"))
    environment = {"NOTIFY_SOCKET": address}
    notifier = Notifier.from_environment(environment)
    yield manager, notifier
    notifier.close()
    manager.socket.close()


def test_each_state_is_one_message(pair: tuple[Manager, Notifier]) -> None:
    """READY, RELOADING, STOPPING, STATUS, WATCHDOG and EXTEND_TIMEOUT as the protocol has them."""
    manager, notifier = pair
    assert notifier.ready("serving on 2 addresses")
    assert manager.heard() == ["READY=1", "STATUS=serving on 2 addresses"]
    assert notifier.reloading()
    first, second = manager.heard()
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0
    assert notifier.ready()
    assert manager.heard() == ["READY=1"]
    assert notifier.status("draining\nREADY=1")
    assert manager.heard() == ["STATUS=draining READY=1"]
    assert notifier.alive()
    assert manager.heard() == ["WATCHDOG=1"]
    assert notifier.extend_timeout(1.5)
    assert manager.heard() == ["EXTEND_TIMEOUT_USEC=1500000"]
    assert notifier.stopping("bye")
    assert manager.heard() == ["STOPPING=1", "STATUS=bye"]


def test_without_a_manager_nothing_happens() -> None:
    """Every call is quiet and says that nobody heard."""
    notifier = Notifier.from_environment({})
    assert not notifier.ready("x")
    assert not notifier.alive()
    notifier.close()
    assert notifier.ping_interval_s is None


@pytest.mark.parametrize("address", ["/nowhere/at/all", "vsock:2:1", "relative", "@"])
def test_a_manager_that_is_not_there_is_no_failure(address: str) -> None:
    """A bad or dead address never raises."""
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
    assert not notifier.ready()
    notifier.close()
    assert not notifier.ready()


def test_a_full_socket_does_not_block(pair: tuple[Manager, Notifier]) -> None:
    """A manager that does not listen costs nothing but the message."""
    _, notifier = pair
    results = [notifier.alive() for _ in range(100_000)]
    assert results[0]
    assert not results[-1]


def test_workers_do_not_inherit_the_socket() -> None:
    """The variables are taken out of the environment that is given on."""
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1", "HOME": "/"}
    Notifier.from_environment(environment).close()
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(
    ("microseconds", "pid", "expected"),
    [
        ("30000000", "", 15.0),
        pytest.param("30000000", str(os.getpid()), 15.0, id="its own process"),
        ("30000000", "1", None),
        ("0", "", None),
        ("", "", None),
        ("soon", "", None),
        ("٣", "", None),
        ("9" * 50, "", None),
    ],
)
def test_the_watchdog_is_pinged_at_half_its_time(
    microseconds: str, pid: str, expected: float | None
) -> None:
    """WATCHDOG_USEC counts when it is a number and meant for this process."""
    environment = {"WATCHDOG_USEC": microseconds, "WATCHDOG_PID": pid}
    assert Notifier.from_environment(environment).ping_interval_s == expected
