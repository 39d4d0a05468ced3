"""The life of a child that is killed: the real registry, downloads and blob store, clients and watchers.

Everything but the workers and devices is what the daemon runs, without sockets. What clients are told is
in the record before anything else happens.
"""

import asyncio
import os
import random
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from modelhostd.adapters import parts
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
from modelhostd.host.registry import Request
from tests.kill.plan import REPOS, REVISIONS, Plan, PulseAt, make_host
from tests.kill.recording import WATCHERS, Recorder, Response, Watcher
from tests.support import wait_until_async

MODELS = 6
CLIENTS = 3
WAIT_S = 0.3
END_S = 30.0
GONE_S = 20.0
"""How long a watcher that was cancelled may take to be gone: it has nothing to wait for."""


class _Stream:
    """As much of a call as a watch looks at."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()


class Life:
    """One life: watchers and clients on a host, until it ends."""

    def __init__(self, plan: Plan, record: Recorder, pulse: PulseAt) -> None:
        self._plan = plan
        self._record = record
        self._pulse = pulse
        self._chance = random.Random(plan.seed)
        self._count = 0
        self._newest: dict[str, int] = {}
        self.host, self._files = make_host(plan)

    async def run(self) -> None:
        """Recover as the daemon does at its start, then make traffic for ever (or end, if calm)."""
        await self._files.recover()
        self._check_what_is_taken_up()
        await self.host.start()
        self._pulse()
        service = EventService(self.host, Statistics(self.host, Gauges()))
        if self._plan.calm:
            await self._end_downloads()
            await self._leave(service)
            await self.host.stop(grace_s=1.0)
            await self.host.close()
            await _all_ended()
            return
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
            if self._plan.calm:
                for event in Response.FromString(message).events:
                    self._newest[watcher.name] = event.sequence

    async def _leave(self, service: EventService) -> None:
        """Watch and go away: who reads is told all that there is, and who is cancelled is gone."""
        watching = [asyncio.ensure_future(self._watch(service, w)) for w in WATCHERS]
        last = self.host.registry.journal.last_sequence
        await wait_until_async(lambda: service.watcher_count == len(watching))
        # It began before the newest event each time, and no filter keeps anything from it.
        await wait_until_async(lambda: self._newest.get("again", 0) >= last, what="all is told")
        for task in watching:
            task.cancel()
        _, late = await asyncio.wait(watching, timeout=GONE_S)
        assert not late, f"cancelled and not gone: {len(late)} watchers"
        assert service.watcher_count == 0, service.watcher_count

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
            self._lease: 1,
            self._slot: 1,
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

    async def _lease(self) -> None:
        lease = await self.host.leases.acquire(self._any(), 1.0 + self._chance.random())
        self._record.ack(f"leases/{lease.id}", change="CREATED")
        if self._chance.random() < 0.7:
            await self.host.leases.release(lease.id)
            self._record.ack(f"leases/{lease.id}", change="DELETED")

    async def _slot(self) -> None:
        slot = f"s{self._chance.randrange(2)}"
        if self._chance.random() < 0.2:
            await self.host.slots.clear(slot)
            self._record.ack(f"slots/{slot}", change="DELETED")
            return
        operation = await self.host.slots.switch(slot, self._any())
        self._began(operation)
        await self._to_the_end(operation)

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


async def _all_ended() -> None:
    """Raise unless everything that the host had begun has ended with it."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=END_S)
    assert not left, f"closed, and still at work: {left}"


def live(plan: Plan, record: Path, pulse_fd: int) -> Any:
    """Run one life to its end; for a child process."""
    parts.BOOT_ID = plan.boot or parts.BOOT_ID

    async def guarded() -> None:
        try:
            await Life(plan, Recorder(record), PulseAt(pulse_fd)).run()
        except BaseException:
            # At once: what does not let itself be cancelled would hold up the end of the loop.
            traceback.print_exc()
            os._exit(1)

    asyncio.run(guarded())
