"""How late a server's event loop is: a timer of 5 ms in the loop itself, which notes by how much it was missed.

The daemon has no such timer. As a program this runs the unchanged daemon with one in its loop (which costs 200
wake-ups a second); the bare server takes the same one. uvloop's timers have a grain of 1 ms. Where the machine
gives the process no CPU, that counts as lag too: read it beside the reference's.

    python bench/loop_lag.py FILE [arguments of modelhostd]
"""

import asyncio
import mmap
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path

INTERVAL_S = 0.005
_ENTRIES = 1 << 16
_COUNT = struct.Struct("<Q")
_ENTRY = struct.Struct("<dd")
_BYTES = _COUNT.size + _ENTRIES * _ENTRY.size


def watch(path: Path) -> None:
    """Note the running loop's lag in a file, for ever: a ring of the last five minutes."""
    loop = asyncio.get_running_loop()
    path.write_bytes(bytes(_BYTES))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), _BYTES)
    count = 0

    def tick(due: float) -> None:
        nonlocal count
        now = time.monotonic()
        place = _COUNT.size + count % _ENTRIES * _ENTRY.size
        _ENTRY.pack_into(memory, place, now, max(0.0, now - due))
        count += 1
        _COUNT.pack_into(memory, 0, count)
        loop.call_later(INTERVAL_S, tick, now + INTERVAL_S)

    tick(time.monotonic())


def lags(path: Path, start: float, end: float) -> list[float]:
    """Return the lags in seconds that were noted between two times (``time.monotonic``)."""
    data = path.read_bytes()
    count = min(_COUNT.unpack_from(data)[0], _ENTRIES)
    entries = _ENTRY.iter_unpack(data[_COUNT.size : _COUNT.size + count * _ENTRY.size])
    return [lag for noted, lag in entries if start <= noted <= end]


def p99_ms(found: Iterable[float]) -> float:
    """Return the 99th percentile of lags, in milliseconds; 0 of none."""
    ordered = sorted(found)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] * 1e3 if ordered else 0.0


def main() -> int:
    """Run the daemon with its loop watched."""
    from modelhostd import __main__, process

    process.prepare()  # before anything imports grpc; a second time changes nothing

    from modelhostd import daemon

    path = Path(sys.argv[1])
    serve = daemon.Daemon.serve

    async def serve_watched(self: daemon.Daemon) -> int:
        watch(path)
        return await serve(self)

    daemon.Daemon.serve = serve_watched  # type: ignore[method-assign]
    return __main__.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
