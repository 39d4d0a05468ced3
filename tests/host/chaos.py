"""Random commands, faults and crashes on a whole host, and what must hold after each of them."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelhostd.adapters.codec import decode_resource
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import (
    FINAL_STATES,
    ArtifactState,
    InstanceState,
    Kind,
    Operation,
    OperationState,
    Phase,
    Source,
)
from modelhostd.host.registry import Request
from tests.fakes.clock import settle
from tests.fakes.database import disk_full
from tests.fakes.gates import Gate
from tests.host.support import Running, World
from tests.host.warm import true
from tests.support import DEADLINE_S

SIZES = {"a": 400, "b": 400, "c": 300, "d": 900}
BUDGET = 1000
HOST_BUDGET = 1000
FAULT = ModelhostError(Reason.NETWORK_ERROR, "no", {"source": "x"})


def gates_of(run: Running, model: str) -> Sequence[Gate]:
    """Return the gates that work with a model passes in a worker."""
    workers = run.workers
    kinds = (workers.infer_gate, workers.load_gate, workers.demote_gate, workers.promote_gate)
    return [kind(model) for kind in kinds]


class Chaos:
    """What the clients of a host know: what was acknowledged, and what may have happened or not.

    ``names[model]`` are the display names that the model may have now; one name, once its change was
    acknowledged. ``made`` has the models that must be there, ``unsure`` those that may be.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.names: dict[str, set[str]] = {}
        self.made: set[str] = set()
        self.unsure: set[str] = set()
        self.busy: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.requests: dict[str, str] = {}
        self.number = 0
        for model, size in SIZES.items():
            self.publish(model, size)

    def publish(self, model: str, size: int) -> None:
        """Put a new revision of a model at its source."""
        self.number += 1
        content = {"model.safetensors": b"%d" % self.number}
        self.world.downloads.add(f"hf://org/{model}", content, predicted_bytes=size)

    # --- clients --------------------------------------------------------------------------------

    def client(self, work: Callable[[], Awaitable[object]]) -> None:
        """Let a client do something, and expect nothing but typed errors."""

        async def call() -> None:
            try:
                await work()
            except ModelhostError as error:
                if error.reason is Reason.INTERNAL:
                    raise

        self.tasks.add(asyncio.ensure_future(call()))

    async def create(self, run: Running, model: str) -> None:
        self.unsure.add(model)
        self.names[model] = {""}
        try:
            await run.host.models.create(ModelSpec(source=Source(f"hf://org/{model}")), model)
        except ModelhostError:
            # Refused or undone: in both cases as before.
            self.unsure.discard(model)
            self.busy.discard(model)
            raise
        self.unsure.discard(model)
        self.made.add(model)
        self.busy.discard(model)

    async def rename(self, run: Running, model: str) -> None:
        self.number += 1
        before, name = self.names[model], f"name {self.number}"
        self.names[model] = before | {name}
        try:
            await run.host.models.update(model, lambda s: replace(s, display_name=name))
        except ModelhostError:
            self.names[model] = before
            self.busy.discard(model)
            raise
        self.names[model] = {name}
        self.busy.discard(model)

    async def delete(self, run: Running, model: str) -> None:
        self.made.discard(model)
        self.unsure.add(model)
        operation = await run.host.models.delete(model, force=True)
        done = await run.host.operations.wait(operation.id, timeout_s=None)
        if done.state is OperationState.SUCCEEDED:
            self.unsure.discard(model)
            assert model not in run.host.registry.committed.models
        self.busy.discard(model)

    async def download(self, run: Running, model: str) -> None:
        self.number += 1
        request = Request(f"r{self.number}", "download")
        operation = await run.host.transfers.download(model, refresh=True, request=request)
        self.requests[request.id] = operation.id

    async def steer(self, run: Running) -> None:
        active = [o for o in run.host.operations.list() if o.state not in FINAL_STATES]
        if active:
            key = self.random.choice(active).id
            command: Callable[[str], Awaitable[Operation]] = self.random.choice(
                [run.host.operations.cancel, run.host.transfers.pause, run.host.transfers.resume]
            )
            await command(key)

    async def watch(self, run: Running) -> None:
        """Watch an operation to its end: its states never go back from a final one."""
        operations = run.host.operations.list()
        if operations:
            seen = [o async for o in run.host.operations.watch(self.random.choice(operations).id)]
            assert all(o.state not in FINAL_STATES for o in seen[:-1])

    # --- one step -------------------------------------------------------------------------------

    async def step(self, run: Running) -> None:
        """Do one random thing."""
        model = self.random.choice(list(SIZES))
        known = model in self.made and model not in self.busy
        host = run.host
        match self.random.randrange(22):
            case 0 | 1 if model not in self.made and model not in self.busy | self.unsure:
                self.busy.add(model)
                self.client(lambda: self.create(run, model))
            case 2 if known:
                self.busy.add(model)
                self.client(lambda: self.rename(run, model))
            case 3 if known and self.random.random() < 0.4:
                self.busy.add(model)
                self.client(lambda: self.delete(run, model))
            case 4 | 5 | 6:
                self.client(lambda: self.download(run, model))
            case 7 | 8 | 9:
                timeout = self.random.choice([None, 1.0, 5.0])
                self.client(lambda: host.inference.infer(model, "", b"x", timeout))
            case 10 | 11:
                self.client(lambda: host.residency.load(model))
            case 12:
                keep = self.random.random() < 0.5
                self.client(lambda: host.residency.unload(model, keep_warm=keep))
            case 13:
                self.client(lambda: host.reloads.reload(model))
            case 14:
                self.client(lambda: self.steer(run))
            case 15:
                self.client(lambda: self.watch(run))
            case 16:
                pinned = self.random.random() < 0.3
                self.client(lambda: host.models.pin(model, pinned=pinned))
            case 17:
                self.fault(run, model)
            case 18:
                self.gates(run, model)
            case 19 if self.tasks:
                self.random.choice(list(self.tasks)).cancel()
                # Whoever was cancelled does not know what came of it.
                self.forget_cancelled()
            case _:
                await run.world.clock.advance(self.random.choice([0.3, 1.0, 4.0]))

    def forget_cancelled(self) -> None:
        """Take names and models of clients that may have gone as unsure."""
        for model in list(self.busy):
            if model in self.made:
                self.made.discard(model)
            self.unsure.add(model)

    def fault(self, run: Running, model: str) -> None:
        """Let something outside the host fail."""
        match self.random.randrange(5):
            case 0 | 1:
                run.database.fail_commits(
                    *[disk_full() for _ in range(self.random.randrange(1, 4))]
                )
            case 2:
                self.world.downloads.fail(f"hf://org/{model}", FAULT, Phase.DOWNLOADING)
            case 3 if run.workers.pids():
                device, own = self.random.choice(list(run.workers._processes))
                blamed = own or self.random.choice([model, ""])
                run.workers.crash(device, model=own, blamed=blamed)
            case _:
                self.publish(model, SIZES[model])

    def gates(self, run: Running, model: str) -> None:
        """Close or open one of the gates that work passes."""
        gate = self.random.choice(gates_of(run, model))
        if gate.closed:
            gate.open()
        else:
            gate.close()

    # --- what must hold -------------------------------------------------------------------------

    def check(self, run: Running) -> None:
        """Assert what holds at every moment."""
        host, decided = run.host, run.host.registry.decided
        assert run.workers.device_bytes("sim-0") <= BUDGET
        assert host.occupancy.ledger.used("sim-0") <= BUDGET
        assert run.workers.image_bytes <= host.occupancy.host.used_bytes <= HOST_BUDGET
        for instance in decided.instances.values():
            route = host.routes.get(instance.model)
            ready = route is not None and route.open
            assert (instance.state is InstanceState.READY) == ready, instance
        models = host.registry.committed.models
        for model in models.values():
            for artifact in model.artifacts:
                whole = artifact.state is ArtifactState.AVAILABLE
                assert not whole or (model.id, artifact.version) in self.world.files.trees
        self.check_known(models)

    def check_known(self, models: Mapping[str, Any]) -> None:
        """Assert that what was acknowledged is there, and nothing that was undone."""
        possible = self.made | self.unsure | self.busy
        assert self.made <= models.keys() <= possible, f"{self.made} {list(models)} {possible}"
        for model in self.made:
            assert models[model].display_name in self.names[model]

    def check_disk(self) -> None:
        """Assert that the rows are what all events together say, and that no sequence is missing."""
        disk = self.world.disk
        assert list(disk.events) == list(range(1, disk.last_sequence + 1))
        folded: dict[tuple[Kind, str], str] = {}
        for event, text, _ in disk.events.values():
            key = (event.kind, event.key)
            assert event.created == (text is not None and key not in folded)
            if text is None:
                assert folded.pop(key, None) is not None, "the end of what nobody has seen"
            else:
                folded[key] = text
        assert folded == disk.rows
        for (kind, _), text in disk.rows.items():
            decode_resource(kind, text)

    # --- the end of a run -----------------------------------------------------------------------

    async def crash(self, run: Running) -> None:
        """End the host at once; its clients do not know what came of their calls."""
        await run.crash()
        await settle()
        self.tasks.clear()
        self.forget_cancelled()
        self.busy.clear()
        self.check_disk()

    def restarted(self, run: Running) -> None:
        """Learn what there is after a restart; what was acknowledged must be part of it."""
        models = run.host.registry.committed.models
        self.check_known(models)
        for model in list(self.unsure):
            if model in models:
                self.made.add(model)
                self.names[model] = {models[model].display_name}
        self.unsure.clear()

    async def quiet(self, run: Running) -> None:
        """Open every gate and wait until everything has ended."""
        host = run.host
        run.database._failures.clear()
        for model in SIZES:
            for gate in gates_of(run, model):
                gate.open()
        await self.world.clock.advance(40.0)
        for operation in host.operations.list():
            if operation.state is OperationState.PAUSED:
                await host.transfers.resume(operation.id)
        await self.world.clock.advance(200.0)
        if self.tasks:
            done, waiting = await asyncio.wait(self.tasks, timeout=DEADLINE_S)
            assert not waiting
            for task in done:
                if not task.cancelled():
                    task.result()
        self.tasks.clear()
        self.check(run)
        assert [o for o in host.operations.list() if o.state not in FINAL_STATES] == []
        true(run)
        assert not host.routes.waited_for()
        await host.registry.flush()
        self.check_disk()
