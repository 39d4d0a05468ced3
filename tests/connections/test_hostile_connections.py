"""Connections that behave badly: the daemon lives, serves the others, and gives everything back."""

import threading
from collections.abc import Sequence

import grpc
import pytest

from bench import attacks, process_use
from bench.raw_connection import RawConnection
from modelhost import Client, Unreachable
from tests.connections.scene import CALL_S, MIB, OWN, Scene, scene
from tests.support import wait_until

KEPT_BYTES = 64 * MIB
"""What an attack may leave behind: what the allocator holds for the next load."""
PEAK_BYTES = 128 * MIB

COUNTS = {
    "never_reading": 100,
    "zero_window": 100,
    "half_open": 100,
    "silent": 200,
    "slow": 200,
    "broken_off": 1_000,
    "garbage": 3_000,
    "rapid_resets": 20_000,
    "gzip_bombs": 100,
}


@pytest.fixture(scope="module")
def at():
    """A daemon and its other client; attacked by one test after the other."""
    with scene() as made:
        made.publish(100, padding=1000)  # more than a window takes
        yield made


def _attacked(at: Scene, name: str, count: int) -> None:
    """Attack while another client reads and writes; check what it costs, then and afterwards."""
    at.publish(20)
    descriptors, rss = at.descriptors(), at.rss_bytes()
    process_use.forget_peak(at.pid)
    held: list[RawConnection] = []
    failed: list[BaseException] = []

    def attack() -> None:
        try:
            held.extend(attacks.ATTACKS[name](at.tcp, count))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=attack, name=name, daemon=True)
    thread.start()
    # Every one of these is answered within its deadline, during the attack and while it holds on.
    while thread.is_alive():
        at.publish(5)
        at.host()
    assert not failed, failed
    at.publish(20)
    with Client(at.tcp) as newcomer:
        assert newcomer.host().pid == at.pid
    assert process_use.peak_bytes(at.pid) - rss < PEAK_BYTES
    for connection in held:
        connection.close()
    # A few: connections that come and go beside the attack.
    wait_until(lambda: at.descriptors() <= descriptors + 3, what="the descriptors return")
    wait_until(lambda: at.subscribers() == 0, what="the attack's watchers are gone")
    assert at.rss_bytes() - rss < KEPT_BYTES
    at.check()


@pytest.mark.parametrize("name", list(COUNTS))
def test_other_clients_are_served(at: Scene, name: str) -> None:
    """While hundreds of connections misbehave, others' calls are answered; then all is given back."""
    _attacked(at, name, COUNTS[name])


def test_a_compressed_request_is_taken(at: Scene) -> None:
    """What is compressed and small is a request like any other; the bombs above are not."""
    with grpc.insecure_channel(at.tcp, options=OWN) as channel:
        call = channel.unary_unary("/modelhost.v1.HostService/GetHost")
        assert call(b"", timeout=CALL_S, compression=grpc.Compression.Gzip)


def test_connections_over_the_limit_are_refused_at_once() -> None:
    """A listener that is full refuses at once, the others serve on; a place that is free again can be had."""
    limit = 8
    with scene("--set", f"limits.max_connections={limit}") as at:
        held: Sequence[RawConnection] = attacks.never_reading(at.tcp, limit)
        wait_until(lambda: at.subscribers() == limit)
        with RawConnection(at.tcp) as refused:
            refused.until_closed()
        # A client is told where it tried, and does not wait for its deadline.
        with Client(at.tcp, timeout=CALL_S) as late, pytest.raises(Unreachable) as caught:
            late.host()
        assert at.tcp in str(caught.value)
        with Client(at.daemon.target) as other:
            assert other.host().pid == at.pid
        held[0].close()
        with Client(at.tcp) as again:
            wait_until(lambda: _answers(again), what="a place is free")
        for connection in held:
            connection.close()


def _answers(client: Client) -> bool:
    try:
        return client.host().pid > 0
    except Unreachable:
        return False
