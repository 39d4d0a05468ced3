"""The life of a child that is killed: the real registry, downloads and blob store, clients and watchers.

Everything but the workers and devices is what the daemon runs, without sockets. What clients are told is
in the record before anything else happens.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.clock import SystemClock
from modelhostd.adapters.database import FILE_NAME, SqliteDatabase
from modelhostd.adapters.downloads import HubDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.hub import HubConfig
from modelhostd.adapters.trees import TreeStore
from modelhostd.api.calls import Call
from modelhostd.api.events import EventService
from modelhostd.api.statistics import Gauges, Statistics
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import (
    FINAL_STATES,
    Model,
    ModelConfig,
    Operation,
    OperationKind,
    OperationState,
    Source,
)
from modelhostd.host import Host, HostConfig
from modelhostd.host.registry import History, Request
from tests.fakes.devices import FakeDevices, sim
from tests.fakes.workers import FakeWorkers
from tests.kill.recording import WATCHERS, Recorder, Watcher

MODELS = 6
REPOS = 4
REVISIONS = ("main", "v2")
CLIENTS = 3
WAIT_S = 0.3
END_S = 10.0
HISTORY = 1500
BUDGET = 2_000


@dataclass(frozen=True)
class Plan:
    """One life of the child: what it begins with. Equal plans make equal choices."""

    number: int
    seed: str
    home: Path
    endpoint: str
    starts: Mapping[str, int] = field(default_factory=dict)
    """The sequence that each watcher wants to begin at."""
    calm: bool = False
    """Take up what the last life left, bring it to its end and stop, instead of making traffic."""
    request: tuple[str, str] = ("", "")
    """A request id and the operation that it was answered with before."""


class PulseAt:
    """Tells the killer that something happened: one byte each, none when nobody reads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, False)

    def __call__(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, b".")


class _Stream:
    """As much of a call as a watch looks at."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()


def make_host(plan: Plan) -> tuple[Host, FileStore]:
    """Return a host over the real database, downloads and files."""
    store = BlobStore(StoreConfig(plan.home, sync_bytes=1024, reserve_bytes=0))
    trees = TreeStore(store)
    files = FileStore(store, trees)
    host = Host(
        HostConfig(
            budgets={"sim-0": BUDGET}, history=History(count=HISTORY, ring=64), keep_operations=40
        ),
        clock=SystemClock(),
        # Short, so that the log is copied into the database between commits, and killed at that.
        database=SqliteDatabase(plan.home / FILE_NAME, idle_s=0.004),
        devices=FakeDevices(sim(0, BUDGET)),
        downloads=HubDownloads(HubConfig(endpoint=plan.endpoint), store, trees),
        files=files,
        workers=FakeWorkers(),
    )
    return host, files


class Life:
    """One life: watchers and clients on a host, until it ends."""

    def __init__(self, plan: Plan, record: Recorder, pulse: PulseAt) -> None:
        self._plan = plan
        self._record = record
        self._pulse = pulse
        self._chance = random.Random(plan.seed)
        self._count = 0
        self.host, self._files = make_host(plan)

    async def run(self) -> None:
        """Recover as the daemon does at its start, then make traffic for ever (or end, if calm)."""
        await self._files.recover()
        self._check_what_is_taken_up()
        await self.host.start()
        self._pulse()
        if self._plan.calm:
            await self._end_downloads()
            await self.host.stop(grace_s=1.0)
            await self.host.close()
            return
        service = EventService(self.host, Statistics(self.host, Gauges()))
        async with asyncio.TaskGroup() as group:
            for watcher in WATCHERS:
                group.create_task(self._watch(service, watcher))
            group.create_task(self._ask_again())
            for _ in range(CLIENTS):
                group.create_task(self._client())

    def _check_what_is_taken_up(self) -> None:
        """Have the disk checked when the start has taken up all that a kill left, before new work."""
        take_away = self.host.storage.take_away_leftovers

        async def and_check() -> None:
            await take_away()
            expected = self.host.storage.expected()
            found = await self._files.check(expected, deep=False, repair=False)
            assert not found, f"a start left behind: {found}"

        vars(self.host.storage)["take_away_leftovers"] = and_check

    async def _end_downloads(self) -> None:
        while waiting := [
            o.id
            for o in self.host.registry.committed.operations.values()
            if o.state not in FINAL_STATES and o.state is not OperationState.PAUSED
        ]:
            done = await self.host.operations.wait(waiting[0], END_S)
            self._record.ack(f"operations/{done.id}", state=done.state.name)

    # --- watching -------------------------------------------------------------------------------

    async def _watch(self, service: EventService, watcher: Watcher) -> None:
        start = self._plan.starts.get(watcher.name, 1)
        self._record.opened(watcher.name, start)
        call = cast(Call, _Stream())
        async for message in service.watch_events(watcher.request(start), call):
            self._record.message(watcher.name, message)

    # --- clients --------------------------------------------------------------------------------

    async def _client(self) -> None:
        verbs = {
            self._create: 4,
            self._update: 4,
            self._download: 6,
            self._delete: 2,
            self._interrupt: 2,
            self._load: 2,
            self._pin: 1,
            self._settings: 1,
        }
        while True:
            (verb,) = self._chance.choices(list(verbs), list(verbs.values()))
            try:
                await verb()
            except ModelhostError as error:
                # Refusals are answers: the model is not there, in use, being deleted, not downloaded.
                if error.reason is Reason.INTERNAL:
                    raise AssertionError(error) from error
                await asyncio.sleep(0)
            self._pulse()

    def _any(self) -> str:
        return f"m{self._chance.randrange(MODELS)}"

    def _mark(self) -> str:
        self._count += 1
        return f"{self._plan.number}.{self._count}"

    def _source(self) -> Source:
        revision = self._chance.choice(REVISIONS)
        return Source(f"hf://org/r{self._chance.randrange(REPOS)}", revision=revision)

    async def _create(self) -> None:
        spec = ModelSpec(self._source(), display_name=self._mark(), description="x" * 200)
        config = ModelConfig(device="sim-0", autoload=self._chance.random() < 0.2)
        model = await self.host.models.create(replace(spec, config=config), self._any())
        self._told(model)

    async def _update(self) -> None:
        source, mark = self._source(), self._mark()
        spec = ModelSpec(source, display_name=mark)
        if self._chance.random() < 0.5:
            self._told(await self.host.models.update(self._any(), lambda _: spec))
        else:
            changed = await self.host.models.update(
                self._any(), lambda old: replace(old, display_name=mark)
            )
            self._told(changed)

    async def _pin(self) -> None:
        pinned = self._chance.random() < 0.5
        model = await self.host.models.pin(self._any(), pinned)
        self._record.ack(f"models/{model.id}", uid=model.uid)

    def _told(self, model: Model) -> None:
        self._record.ack(f"models/{model.id}", uid=model.uid, display_name=model.display_name)

    async def _settings(self) -> None:
        limit = 1_000 + self._plan.number * 20 + self._count % 20
        current = self.host.registry.decided.settings
        given = replace(current, queue_limit=min(limit, 100_000))
        settings = await self.host.update_settings(given, ["queue_limit"])
        self._record.ack("settings", queue_limit=settings.queue_limit)

    async def _download(self) -> None:
        request = Request(f"request-{self._mark()}", "f")
        operation = await self.host.transfers.download(
            self._any(), refresh=self._chance.random() < 0.3, request=request
        )
        self._began(operation)
        self._record.ack(f"requests/{request.id}", answer=operation.id)
        if self._chance.random() < 0.7:
            await self._to_the_end(operation)

    async def _delete(self) -> None:
        operation = await self.host.models.delete(
            self._any(), force=True, keep_entry=self._chance.random() < 0.5
        )
        self._began(operation)
        await self._to_the_end(operation)

    async def _load(self) -> None:
        if self._chance.random() < 0.6:
            operation = await self.host.residency.load(self._any())
        else:
            operation = await self.host.residency.unload(self._any())
        self._began(operation)

    async def _interrupt(self) -> None:
        running = [
            o.id
            for o in self.host.registry.committed.operations.values()
            if o.kind is OperationKind.DOWNLOAD and o.state not in FINAL_STATES
        ]
        if not running:
            return
        key = self._chance.choice(running)
        what = self._chance.random()
        if what < 0.4:
            operation = await self.host.operations.cancel(key)
        elif what < 0.7:
            operation = await self.host.transfers.pause(key)
        else:
            operation = await self.host.transfers.resume(key)
        self._began(operation)

    def _began(self, operation: Operation) -> None:
        self._record.ack(f"operations/{operation.id}")

    async def _to_the_end(self, operation: Operation) -> None:
        done = await self.host.operations.wait(operation.id, WAIT_S)
        if done.state in FINAL_STATES:
            self._record.ack(f"operations/{done.id}", state=done.state.name)

    async def _ask_again(self) -> None:
        """Repeat a request of the last life: it has the same answer."""
        request, answer = self._plan.request
        known = self.host.registry.committed.operations
        if not request or answer not in known:
            return
        operation = await self.host.transfers.download("m0", request=Request(request, "f"))
        assert operation.id == answer, (request, answer, operation.id)


def live(plan: Plan, record: Path, pulse_fd: int) -> Any:
    """Run one life to its end; for a child process."""
    asyncio.run(Life(plan, Recorder(record), PulseAt(pulse_fd)).run())
