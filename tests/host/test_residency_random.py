"""Random work on a host over fakes: no deadlock, no byte above the budget, ledger equal to what is held."""

import asyncio
import random
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import FINAL_STATES, InstanceState
from tests.fakes.clock import settle
from tests.host.support import Running, World

MODELS = {"a": 400, "b": 400, "c": 300, "d": 900, "e": 100}
BUDGET = 1000
STEPS = 120


async def _step(run: Running, rng: random.Random, tasks: set["asyncio.Future[object]"]) -> None:
    model = rng.choice(list(MODELS))
    match rng.randrange(12):
        case 0 | 1 | 2 | 3:
            timeout = rng.choice([None, 1.0, 5.0])
            tasks.add(asyncio.ensure_future(run.host.inference.infer(model, "", b"x", timeout)))
        case 4 | 5:
            tasks.add(asyncio.ensure_future(run.host.residency.load(model)))
        case 6:
            tasks.add(asyncio.ensure_future(run.host.residency.unload(model)))
        case 7:
            tasks.add(asyncio.ensure_future(run.host.models.pin(model, pinned=rng.random() < 0.3)))
        case 8:
            gate = rng.choice([run.workers.infer_gate, run.workers.load_gate])(model)
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
        case 11:
            if run.workers.pids():
                device, own = rng.choice(list(run.workers._processes))
                run.workers.crash(device, model=own, blamed=own or rng.choice([model, ""]))


def _check(run: Running) -> None:
    held = run.workers.device_bytes("sim-0")
    assert held <= BUDGET
    assert run.workers.peak_bytes.get("sim-0", 0) <= BUDGET
    assert run.host.occupancy.ledger.used("sim-0") <= BUDGET
    for instance in run.host.registry.decided.instances.values():
        route = run.host.routes.get(instance.model)
        assert (instance.state is InstanceState.READY) == (route is not None and route.open)


@pytest.mark.parametrize("seed", range(25))
async def test_random_work_never_breaks_the_ledger_or_hangs(tmp_path: Path, seed: int) -> None:
    """After any mix of requests, loads, pins, cancels and crashes everything ends and adds up."""
    rng = random.Random(seed)
    world = World(tmp_path)
    async with world.host(budget=BUDGET) as run:
        for model, size in MODELS.items():
            await run.have(model, size, load_timeout_s=10.0)
        tasks: set[asyncio.Future[object]] = set()
        for _ in range(STEPS):
            await _step(run, rng, tasks)
            await settle(rng.randrange(3))
            _check(run)
        await settle()  # or a pin of the last step comes after its end
        for model in MODELS:
            run.workers.infer_gate(model).open()
            run.workers.load_gate(model).open()
            await run.host.models.pin(model, pinned=False)
            await run.host.residency.unblock(model)
        for _ in range(4):
            await world.clock.advance(5.0)
            _check(run)
        done, waiting = await asyncio.wait(tasks, timeout=5.0)
        assert not waiting
        for task in done:
            error = task.exception()
            assert error is None or isinstance(error, ModelhostError), error
        assert all(o.state in FINAL_STATES for o in run.host.operations.list())
        assert run.host.occupancy.ledger.used("sim-0") == run.workers.device_bytes("sim-0")
        for model in MODELS:
            assert (await run.host.inference.infer(model, "", b"y", 5.0)).payload == b"y"
