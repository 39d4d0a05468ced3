"""Clients that behave badly, by the number: what a daemon must live with while it serves the others.

Each attack takes a target and a count, and returns the connections that it still holds. As a program it
attacks from a process of its own, says ``held`` when it is done, and lets go when its input ends::

    python bench/attacks.py garbage 127.0.0.1:7411 3000
"""

import random
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import h2_frames as h2
from bench.raw_connection import RawConnection, request, request_of
from modelhost.v1 import event_service_pb2

Attack = Callable[[str, int], Sequence[RawConnection]]

WATCH = "/modelhost.v1.EventService/WatchEvents"
HEALTH = "/grpc.health.v1.Health/Watch"
EVERYTHING = event_service_pb2.WatchEventsRequest(start_sequence=1).SerializeToString()
RESETS_AT_ONCE = 100
BOMBS_AT_ONCE = 5
BOMB_MIB = 60
SMALL_BUFFER = 4096
_CANCEL = struct.pack(">I", 8)


def never_reading(target: str, count: int) -> Sequence[RawConnection]:
    """Watch all events and read nothing."""
    held = []
    for _ in range(count):
        connection = RawConnection(target, receive_bytes=SMALL_BUFFER).begin()
        connection.call(WATCH, EVERYTHING)
        held.append(connection)
    return held


def zero_window(target: str, count: int) -> Sequence[RawConnection]:
    """Watch health and events with windows of 0 bytes, reading what HTTP/2 itself says."""
    held = []
    for number in range(count):
        connection = RawConnection(target).begin(initial_window=0)
        connection.acknowledge()
        connection.call(*((HEALTH, b"") if number % 2 else (WATCH, EVERYTHING)))
        connection.drain()
        held.append(connection)
    return held


def half_open(target: str, count: int) -> Sequence[RawConnection]:
    """Ask, say that nothing more will come, and stay."""
    held = []
    for _ in range(count):
        connection = RawConnection(target).begin()
        connection.call(WATCH, EVERYTHING)
        connection.half_close()
        held.append(connection)
    return held


def silent(target: str, count: int) -> Sequence[RawConnection]:
    """Connect and say nothing."""
    return [RawConnection(target) for _ in range(count)]


def slow(target: str, count: int) -> Sequence[RawConnection]:
    """Stop in the middle: of the preface, of a frame's head, of headers, of a message."""
    whole = request(1, WATCH, EVERYTHING)
    settings = h2.settings(initial_window=65_535)
    starts = (
        h2.PREFACE[:10],
        h2.PREFACE + settings[:5],
        h2.PREFACE + settings + whole[:20],
        h2.PREFACE + settings + request(1, WATCH, EVERYTHING, ends=False)[:-1],
    )
    held = []
    for number in range(count):
        connection = RawConnection(target)
        connection.send(starts[number % len(starts)])
        held.append(connection)
    return held


def broken_off(target: str, count: int) -> Sequence[RawConnection]:
    """Ask for everything and end the connection with RST while the answer comes."""
    for number in range(count):
        connection = RawConnection(target, receive_bytes=SMALL_BUFFER).begin()
        connection.call(WATCH, EVERYTHING)
        if number % 2:
            connection.read()
        connection.reset()
    return ()


def garbage(target: str, count: int) -> Sequence[RawConnection]:
    """Say what is not HTTP/2, or not for long, and go."""
    chance = random.Random(1)
    for number in range(count):
        connection = RawConnection(target)
        try:
            connection.send(_nonsense(number, chance))
        except OSError:
            # The daemon has had enough before it was all said.
            continue
        finally:
            connection.close()
    return ()


def _nonsense(number: int, chance: random.Random) -> bytes:
    begun = h2.PREFACE + h2.settings(initial_window=65_535)
    match number % 6:
        case 0:
            return chance.randbytes(200)
        case 1:
            return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        case 2:
            return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500)  # TLS
        case 3:
            return begun + chance.randbytes(500)
        case 4:
            return begun + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, chance.randbytes(100))
        case _:
            return begun + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"  # 16 MiB of DATA, it says


def rapid_resets(target: str, count: int) -> Sequence[RawConnection]:
    """Begin a call and cancel it at once, again and again on one connection."""
    done = 0
    connection = RawConnection(target).begin()
    connection.acknowledge()
    while done < count:
        streams = [connection.next_stream() for _ in range(min(RESETS_AT_ONCE, count - done))]
        resets = b"".join(h2.frame(h2.RST, 0, stream, _CANCEL) for stream in streams)
        try:
            # Apart from each other, so that some calls have begun before they are cancelled.
            connection.send(b"".join(request(stream, WATCH, EVERYTHING) for stream in streams))
            connection.send(resets)
            done += len(streams)
            open_still = connection.drain() and not connection.goaway
        except OSError:
            open_still = False
        if not open_still:
            # Given up by the daemon: come again.
            connection.close()
            connection = RawConnection(target).begin()
            connection.acknowledge()
    connection.close()
    return ()


def gzip_bombs(target: str, count: int) -> Sequence[RawConnection]:
    """Send calls with a compressed message that is a thousand times as large as it looks."""
    body = h2.message(bomb(BOMB_MIB), compressed=True)
    held = []
    for start in range(0, count, BOMBS_AT_ONCE):
        connection = RawConnection(target).begin()
        connection.acknowledge()
        for _ in range(min(BOMBS_AT_ONCE, count - start)):
            stream = connection.next_stream()
            connection.send(request_of(stream, WATCH, body, grpc_encoding="gzip"))
        held.append(connection)
    for connection in held:
        for stream in range(1, connection.next_stream(), 2):
            connection.until_ended(stream)
    return held


def bomb(mib: int) -> bytes:
    """Return ``mib`` MiB of zeros, compressed."""
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: with gzip's head
    return b"".join(pack.compress(bytes(2**20)) for _ in range(mib)) + pack.flush()


ATTACKS: Mapping[str, Attack] = {
    attack.__name__: attack
    for attack in (
        never_reading,
        zero_window,
        half_open,
        silent,
        slow,
        broken_off,
        garbage,
        rapid_resets,
        gzip_bombs,
    )
}


def main() -> int:
    """Attack, say so, and hold what is held until the input ends."""
    name, target, count = sys.argv[1:]
    held = ATTACKS[name](target, int(count))
    print("held", flush=True)
    sys.stdin.read()
    for connection in held:
        connection.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
