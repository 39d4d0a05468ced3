"""What the gateway's tests share: a gateway on a free port, and requests as raw as they need to be."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from modelhostd.config_values import Address
from modelhostd.core.rpc_stats import RpcStats
from modelhostd.core.tallies import Tallies
from modelhostd.gateway.gateway import Gateway
from modelhostd.gateway.sources import Sources
from modelhostd.host import Host
from tests.support import DEADLINE_S


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: str


@dataclass
class Scene:
    """A gateway over a host, and what it is told."""

    gateway: Gateway
    sources: Sources
    port: int
    serving: bool = True
    open: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a connection, closed at the end of the scene."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.open.append(writer)
        return reader, writer

    async def ask(self, data: bytes) -> Answer:
        """Send bytes on a connection of their own and return the answer."""
        reader, writer = await self.connect()
        writer.write(data)
        async with asyncio.timeout(DEADLINE_S):
            return await read_answer(reader)

    async def get(self, path: str, host: str = "localhost", method: str = "GET") -> Answer:
        """Ask for a path."""
        request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        return await self.ask(request.encode())


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read one answer; its body ends where its headers say, or with the connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read()
    return Answer(int(first.split()[1]), headers, body.decode())


@asynccontextmanager
async def gateway_on(host: Host) -> AsyncIterator[Scene]:
    """Serve a host's metrics on a free port until the end of the block."""
    tallies = Tallies(host.registry.committed.models.values())
    host.registry.subscribe(tallies.fold)
    sources = Sources(host, RpcStats(), tallies)
    scene: Scene
    gateway = Gateway(Address("127.0.0.1", 0), sources, lambda: scene.serving)
    port = urlsplit(gateway.listen()).port
    assert port is not None
    scene = Scene(gateway, sources, port)
    gateway.start()
    try:
        yield scene
    finally:
        for writer in scene.open:
            writer.close()
        await gateway.stop()


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return sample name -> sorted labels -> value; no sample may come twice."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            key = tuple(sorted(sample.labels.items()))
            assert key not in series, (sample.name, key)
            series[key] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float | None:
    """Return the sum of the samples that have these labels; None = there is none."""
    wanted = set(labels.items())
    matching = [v for key, v in samples(text).get(name, {}).items() if wanted <= set(key)]
    return sum(matching) if matching else None
