"""The two paths over a real socket: what they answer, to whom, and what nobody gets."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelhostd.gateway.app import HOSTS
from tests.gateway.support import Scene, gateway_on, value
from tests.host.support import World


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    """A gateway over a host with one model."""
    async with World(tmp_path).host() as running:
        await running.add("a")
        async with gateway_on(running.host) as scene:
            yield scene


async def test_healthz_is_the_daemon_s_own_answer(scene: Scene) -> None:
    """200 while calls are taken, 503 when they are not, and back: never a constant."""
    for serving, status, word in ((True, 200, "SERVING"), (False, 503, "NOT_SERVING")) * 2:
        scene.serving = serving
        answer = await scene.get("/healthz")
        assert answer.status == status
        assert answer.body.count("\n") == 1
        body = json.loads(answer.body)
        assert body["status"] == word
        assert body["storeId"] == scene.sources.host.registry.store_id


async def test_metrics_are_text_for_prometheus(scene: Scene) -> None:
    """The content type names the format, and the numbers are of this moment."""
    answer = await scene.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert value(answer.body, "modelhost_model_state", model="a") == 1
    assert "server" not in answer.headers


async def test_no_answer_is_kept_or_shared(scene: Scene) -> None:
    """Nothing is cached, nothing is guessed, and no other origin may read it."""
    for path in ("/healthz", "/metrics"):
        answer = await scene.get(path)
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_nothing_but_get(scene: Scene) -> None:
    """Other methods are 405, those of a preflight too."""
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "NONSENSE"):
        answer = await scene.get("/metrics", method=method)
        assert answer.status == 405, method
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_head_has_no_body(scene: Scene) -> None:
    """HEAD answers as GET would, without a body."""
    reader, writer = await scene.connect()
    writer.write(b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    data = await reader.read()
    assert data.startswith(b"HTTP/1.1 200")
    assert data.endswith(b"\r\n\r\n")


async def test_this_machine_s_names_are_served(scene: Scene) -> None:
    """With a port or without, IPv6 in brackets."""
    for host in (*HOSTS, "localhost:7412", "[::1]:7412", "127.0.0.1:1", "LOCALHOST"):
        assert (await scene.get("/healthz", host=host)).status == 200, host


async def test_a_foreign_host_is_refused(scene: Scene) -> None:
    """A page that points its own name at this machine gets nothing."""
    for host in (
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("", "[::1", "gpu-box:7412"),
    ):
        answer = await scene.get("/healthz", host=host)
        assert answer.status == 400, host
        assert "SERVING" not in answer.body


async def test_unknown_paths_are_404(scene: Scene) -> None:
    """Nothing else is there, whatever the path looks like."""
    for path in ("/", "/metrics/", "/healthz/x", "/../etc/passwd", "/%2e%2e/metrics"):
        assert (await scene.get(path)).status in {307, 404}, path


async def test_what_is_no_request_is_refused(scene: Scene) -> None:
    """Garbage, a head without end and another protocol get a 4xx and the end."""
    for data in (
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        assert 400 <= (await scene.ask(data)).status < 500, data[:40]
    assert (await scene.get("/healthz")).status == 200


async def test_a_body_is_not_read(scene: Scene) -> None:
    """A POST that promises a gigabyte is refused by its head."""
    head = b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1073741824\r\n\r\n"
    assert (await scene.ask(head + b"x" * 65536)).status == 405
