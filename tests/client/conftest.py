"""The daemon's double, and both clients on it."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelhost import AsyncClient, Client
from tests.client.double import Double


@pytest.fixture
def double(tmp_path: Path) -> Iterator[Double]:
    """A double on a unix socket."""
    daemon = Double(f"unix:{tmp_path}/d.sock").start()
    yield daemon
    daemon.stop()


@pytest.fixture
def client(double: Double) -> Iterator[Client]:
    """A client of the double that repeats nothing."""
    with Client(double.target, retries=False) as made:
        yield made


Both = Callable[[Callable[[Any], Any]], Any]


@pytest.fixture(params=["sync", "async"])
def both(request: pytest.FixtureRequest, double: Double) -> Both:
    """Run a call on a client of either kind: ``both(lambda c: c.get("a"))``.

    An asynchronous iterator comes back as a list, and a synchronous one, too.
    """

    def run_sync(call: Callable[[Any], Any]) -> Any:
        with Client(double.target, retries=False) as made:
            result = call(made)
            return list(result) if inspect.isgenerator(result) else result

    async def run_async(call: Callable[[Any], Any]) -> Any:
        async with AsyncClient(double.target, retries=False) as made:
            result = call(made)
            if inspect.isasyncgen(result):
                return [item async for item in result]
            return await result if inspect.isawaitable(result) else result

    if request.param == "sync":
        return run_sync
    return lambda call: asyncio.run(run_async(call))
