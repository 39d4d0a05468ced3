"""A host over fakes, and the shortest ways to put models into it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Model, Operation, OperationState, Phase, Source
from modelhostd.host import Host, HostConfig
from modelhostd.host.registry import History
from modelhostd.ports import Clock, Workers
from tests.fakes.clock import FakeClock
from tests.fakes.database import FakeDatabase, FakeDisk
from tests.fakes.devices import FakeDevices, sim
from tests.fakes.downloads import FakeDownloads
from tests.fakes.files import FakeFiles
from tests.fakes.uploads import FakeUploads
from tests.fakes.workers import FakeWorkers
from tests.support import DEADLINE_S

MODEL_BYTES = 400
BUDGET = 1000


@dataclass
class World:
    """Everything outside the host, which a restart of the host survives."""

    root: Path
    disk: FakeDisk = field(default_factory=FakeDisk)
    clock: FakeClock = field(default_factory=FakeClock)

    def __post_init__(self) -> None:
        self.files = FakeFiles(self.root)
        self.downloads = FakeDownloads(self.files)
        self.uploads = FakeUploads(self.files)

    @asynccontextmanager
    async def host(
        self,
        *,
        budget: int = BUDGET,
        host_budget: int = 0,
        devices: int = 1,
        history: History | None = None,
        real_workers: Workers | None = None,
        real_clock: Clock | None = None,
        failing: Sequence[ModelhostError] = (),
        downloads_per_host: int = 0,
        health_interval_s: float = 60.0,
        drain_timeout_s: float = 3600.0,
    ) -> AsyncIterator["Running"]:
        """Start a host on this world and stop it at the end; fakes idle beside real ones.

        ``budget`` 0 = none is configured; ``host_budget`` is that of host memory. The first commits fail with ``failing``.
        What drains is not on the clock of the world: it is given longer than any test takes.
        """
        database = FakeDatabase(self.disk)
        if failing:
            database.fail_commits(*failing)
        workers = FakeWorkers()
        ids = [f"sim-{i}" for i in range(devices)]
        host = Host(
            HostConfig(
                budgets=dict.fromkeys(ids, budget) if budget else {},
                host_default_bytes=host_budget,
                history=history or History(),
                downloads_per_host=downloads_per_host,
                health_interval_s=health_interval_s,
                settings_over=lambda stored: replace(stored, drain_timeout_s=drain_timeout_s),
            ),
            clock=real_clock or self.clock,
            database=database,
            devices=FakeDevices(*(sim(i, max(10_000, budget)) for i in range(devices))),
            downloads=self.downloads,
            uploads=self.uploads,
            files=self.files,
            workers=real_workers or workers,
        )
        await host.start()
        running = Running(self, host, workers, database)
        try:
            yield running
        finally:
            if not running.crashed:
                await host.stop(grace_s=1.0)
                await (real_workers or workers).stop(5.0)
                await host.close()


@dataclass
class Running:
    """A started host and its fakes."""

    world: World
    host: Host
    workers: FakeWorkers
    database: FakeDatabase
    crashed: bool = False

    async def add(self, model: str, size: int = MODEL_BYTES, **config: object) -> Model:
        """Register a model whose files take ``size`` bytes."""
        uri = f"hf://org/{model}"
        content = {"config.json": b"{}", "model.safetensors": b"w" * (size - 2)}
        self.world.downloads.add(uri, content, task="feature-extraction", predicted_bytes=size)
        spec = rules.ModelSpec(
            source=Source(uri=uri),
            config=rules.ModelConfig(**config),  # type: ignore[arg-type]
        )
        return await self.host.models.create(spec, model)

    async def have(self, model: str, size: int = MODEL_BYTES, **config: object) -> Model:
        """Register a model and bring its files to disk."""
        await self.add(model, size, **config)
        await self.end(await self.host.transfers.download(model))
        return self.host.models.get(model)

    async def load(self, model: str) -> Operation:
        """Load a model and wait for the end of it."""
        return await self.end(await self.host.residency.load(model))

    async def end(self, operation: Operation) -> Operation:
        """Return an operation once it has ended well."""
        done = await self.host.operations.wait(operation.id, timeout_s=DEADLINE_S)
        assert done.state is OperationState.SUCCEEDED, done
        return done

    def infer(self, model: str, timeout_s: float | None = None) -> "asyncio.Task[bytes]":
        """Send a request ``x`` and return the task that has its answer."""

        async def answer() -> bytes:
            return (await self.host.inference.infer(model, "", b"x", timeout_s)).payload

        return asyncio.ensure_future(answer())

    async def ended(self, key: str) -> OperationState:
        """Return how an operation ended."""
        return (await self.host.operations.wait(key, timeout_s=DEADLINE_S)).state

    async def failed(self, operation: Operation) -> Operation:
        """Return an operation once it has failed."""
        done = await self.host.operations.wait(operation.id, timeout_s=DEADLINE_S)
        assert done.state is OperationState.FAILED, done
        return done

    def blame(self, model: str, *, exit: str = "signal SIGKILL", stderr_tail: str = "") -> None:
        """End the worker that a model is in, its own or the shared one, and blame it."""
        route = self.host.routes.get(model)
        own = model if route is not None and route.own_worker else ""
        self.workers.crash("sim-0", model=own, blamed=model, exit=exit, stderr_tail=stderr_tail)

    def reasons(self, kind: str = "") -> list[str]:
        """Return the reasons of all events so far, of one kind or of all."""
        ring = self.host.registry.journal
        events = ring._ring.read(1, 10_000) or ()
        return [e.reason for e in events if kind in ("", e.kind.value)]

    async def crash(self) -> None:
        """End the host as ``kill -9`` would: what was not committed is gone."""
        self.crashed = True
        await self.database.crash()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)


async def held(run: Running, model: str, phase: Phase = Phase.DOWNLOADING) -> Operation:
    """Return a download that stands still in a phase."""
    hold = run.world.downloads.hold(f"hf://org/{model}", phase)
    operation = await run.host.transfers.download(model)
    await hold.reached.wait()
    await run.host.registry.flush()
    return operation


def release(run: Running, model: str, phase: Phase = Phase.DOWNLOADING) -> None:
    """Let the downloads of a model go on, and later ones pass."""
    run.world.downloads.unhold(f"hf://org/{model}", phase)
