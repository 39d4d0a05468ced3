"""A line that is long and narrow: a TCP proxy that delays every byte and paces each connection.

Each direction of a connection is a line of its own: bytes leave it ``rate`` a second at most and arrive ``delay``
later; a connection costs one round trip before its first byte, as a handshake would. Left out, to the favour of
whoever opens many connections: a window that has to grow. A process of its own, since it moves all the bytes:

    python bench/shaping_proxy.py --target 8080 --delay-ms 20 --rate 50000000     prints its port
"""

import argparse
import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK_BYTES = 128 << 10
AHEAD_S = 0.05
"""What a line holds beyond what is on its way: the loop may come so late without a gap."""
Line = asyncio.Queue[tuple[float, bytes]]
"""When bytes arrive (the loop's time), and which; no bytes = the end."""


@contextmanager
def shaped(target: int, *, delay_s: float, rate: int) -> Iterator[int]:
    """Run a proxy to a port of 127.0.0.1; yields its own port there."""
    command = [sys.executable, __file__, "--target", str(target), "--rate", str(rate)]
    command += ["--delay-ms", str(delay_s * 1e3)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


async def serve(target: int, delay_s: float, rate: int) -> None:
    """Listen on a free port of 127.0.0.1, print it, and carry until cancelled."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.setblocking(False)
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        async with asyncio.TaskGroup() as connections:
            while True:
                client, _ = await loop.sock_accept(listener)
                connections.create_task(_connection(client, target, delay_s, rate))


async def _connection(client: socket.socket, target: int, delay_s: float, rate: int) -> None:
    loop = asyncio.get_running_loop()
    held = int(rate * (delay_s + AHEAD_S)) // CHUNK_BYTES + 2
    with client, socket.socket() as server:
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await loop.sock_connect(server, ("127.0.0.1", target))
            await asyncio.sleep(2 * delay_s)
            async with asyncio.TaskGroup() as both:
                for source, sink in ((client, server), (server, client)):
                    line: Line = asyncio.Queue(held)
                    both.create_task(_leave(source, line, delay_s, rate))
                    both.create_task(_arrive(line, sink))
        except* OSError:
            pass  # one end went away: so does the other


async def _leave(source: socket.socket, line: Line, delay_s: float, rate: int) -> None:
    loop = asyncio.get_running_loop()
    free, data = 0.0, b"."
    while data:
        data = await loop.sock_recv(source, CHUNK_BYTES)
        # The line is busy until its last byte has left.
        free = max(free, loop.time()) + len(data) / rate
        await line.put((free + delay_s, data))


async def _arrive(line: Line, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, data = await line.get()
        await asyncio.sleep(max(0.0, due - loop.time()))
        if not data:
            break
        await loop.sock_sendall(sink, data)
    sink.shutdown(socket.SHUT_WR)


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=int, required=True, help="a port of 127.0.0.1")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="of each direction")
    parser.add_argument("--rate", type=int, default=50_000_000, help="bytes a second")
    given = parser.parse_args()
    asyncio.run(serve(given.target, given.delay_ms / 1e3, given.rate))


if __name__ == "__main__":
    main()
