"""Random work on a host over fakes: no deadlock, no byte above the budget, ledger equal to what is held."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import FINAL_STATES, InstanceState, Settings
from tests.fakes.clock import settle
from tests.fakes.gates import Gate
from tests.host.support import Running, World
from tests.host.warm import true
from tests.support import DEADLINE_S

HOST_BUDGET = 900
MODELS = {"a": 400, "b": 400, "c": 300, "d": 900, "e": 100}
BUDGET = 1000
STEPS = 120


async def _step(run: Running, rng: random.Random, tasks: set["asyncio.Future[object]"]) -> None:
    model = rng.choice(list(MODELS))
    match rng.randrange(13):
        case 0 | 1 | 2 | 3:
            timeout = rng.choice([None, 1.0, 5.0])
            tasks.add(asyncio.ensure_future(run.host.inference.infer(model, "", b"x", timeout)))
        case 4 | 5:
            tasks.add(asyncio.ensure_future(run.host.residency.load(model)))
        case 6:
            how = {"keep_warm": rng.random() < 0.5, "force": rng.random() < 0.2}
            tasks.add(asyncio.ensure_future(run.host.residency.unload(model, **how)))
        case 7:
            tasks.add(asyncio.ensure_future(run.host.models.pin(model, pinned=rng.random() < 0.3)))
        case 8:
            gate = rng.choice(_gates(run))(model)
            if gate.closed:
                gate.open()
            else:
                gate.close()
        case 9:
            await run.world.clock.advance(rng.choice([0.3, 1.0, 4.0]))
        case 10:
            active = [o for o in run.host.operations.list() if o.state not in FINAL_STATES]
            if active:
                chosen = rng.choice(active)
                tasks.add(asyncio.ensure_future(run.host.operations.cancel(chosen.id)))
        case 11 if rng.random() < 0.3:
            budget = rng.choice([0, 400, HOST_BUDGET])
            settings = Settings(host_budget_bytes=budget)
            with contextlib.suppress(ModelhostError):  # below what pins hold of it
                await run.host.update_settings(settings, ["host_budget_bytes"])
        case 12:
            if run.workers.infer_errors.pop(model, None) is None:
                run.workers.infer_errors[model] = _short(rng.choice([0, 50, 5000]))
        case 11:
            if run.workers.pids():
                device, own = rng.choice(list(run.workers._processes))
                run.workers.crash(device, model=own, blamed=own or rng.choice([model, ""]))


def _short(missing: int) -> ModelhostError:
    """Return what a request that finds too little memory is answered."""
    facts = {"neededBytes": str(missing)} if missing else {}
    return ModelhostError(Reason.OUT_OF_DEVICE_MEMORY, "no room", facts)


def _gates(run: Running) -> list[Callable[[str], Gate]]:
    workers = run.workers
    passed = [workers.infer_gate, workers.load_gate, workers.promote_gate, workers.demote_gate]
    return [*passed, workers.copy_gate]


def _check(run: Running) -> None:
    host = run.host.occupancy.host
    assert run.workers.image_bytes <= host.used_bytes <= HOST_BUDGET
    for model in host.warm:
        instance = run.host.registry.decided.instance_of(model)
        assert instance is not None
        assert instance.state is InstanceState.WARM
        assert model in run.workers.warm
        assert run.host.routes.get(model) is None
    held = run.workers.device_bytes("sim-0")
    assert held <= BUDGET
    assert run.workers.peak_bytes.get("sim-0", 0) <= BUDGET
    assert run.host.occupancy.ledger.used("sim-0") <= BUDGET
    for instance in run.host.registry.decided.instances.values():
        route = run.host.routes.get(instance.model)
        assert (instance.state is InstanceState.READY) == (route is not None and route.open)
    assert run.workers.unowned_bytes() <= host.used_bytes


def _bound(run: Running) -> int:
    """What cannot go when the budget shrinks: copies of what moves, is wanted, held, stuck or going already."""
    host = run.host.occupancy.host
    return sum(h.bytes for h in host.view().holdings if not h.idle)


@pytest.mark.parametrize("seed", [*range(25), 1275])
async def test_random_work_never_breaks_the_ledger_or_hangs(tmp_path: Path, seed: int) -> None:
    """After any mix of requests, loads, pins, cancels and crashes everything ends and adds up."""
    rng = random.Random(seed)
    world = World(tmp_path)
    async with world.host(budget=BUDGET, host_budget=HOST_BUDGET) as run:
        for model, size in MODELS.items():
            await run.have(model, size, load_timeout_s=10.0)
        run.workers.stuck = {"e"} if seed % 5 == 1 else set()
        if seed % 2:
            run.workers.leavings.outliving, run.workers.leavings.damaged = set("abcd"), {"d"}
        tasks: set[asyncio.Future[object]] = set()
        for _ in range(STEPS):
            await _step(run, rng, tasks)
            await settle(rng.randrange(3))
            _check(run)
        run.workers.infer_errors.clear()
        await settle()  # or a pin of the last step comes after its end
        for model in MODELS:
            for gate in _gates(run):
                gate(model).open()
            await run.host.models.pin(model, pinned=False)
            await run.host.residency.unblock(model)
        for _ in range(4):
            await world.clock.advance(5.0)
            _check(run)
            host = run.host.occupancy.host
            assert host.used_bytes <= max(host.capacity_bytes, _bound(run))
        done, waiting = await asyncio.wait(tasks, timeout=DEADLINE_S)
        assert not waiting
        for task in done:
            error = task.exception()
            assert error is None or isinstance(error, ModelhostError), error
        assert all(o.state in FINAL_STATES for o in run.host.operations.list())
        true(run)
        for model in MODELS:
            assert (await run.host.inference.infer(model, "", b"y", DEADLINE_S)).payload == b"y"
