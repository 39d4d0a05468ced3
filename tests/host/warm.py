"""Looks at warm copies: what the workers did, what is where, and whether the ledger is true."""

from modelhostd.core.host_tier import HOST
from modelhostd.core.resources import InstanceState
from tests.host.support import Running


def verbs(run: Running, model: str) -> list[str]:
    """What the workers did with a model, requests left out."""
    return [verb for verb, _, name, _ in run.workers.log if name == model and verb != "infer"]


def state(run: Running, model: str) -> InstanceState | None:
    instance = run.host.registry.decided.instance_of(model)
    return instance.state if instance is not None else None


def true(run: Running) -> None:
    """Assert that the ledger is what the workers hold, of the device and of host memory."""
    ledger = run.host.occupancy.ledger
    instances = run.host.registry.decided.instances.values()
    working = sum(i.working_bytes for i in instances if i.state is InstanceState.READY)
    assert ledger.used("sim-0") == run.workers.device_bytes("sim-0") + working
    assert ledger.used(HOST) == run.workers.image_bytes
    assert set(run.host.occupancy.host.warm) == set(run.workers.warm)


async def evicted(run: Running, *models: str) -> None:
    """Have models of which each one that is loaded takes the place of the one before."""
    for model in models:
        if model not in run.host.registry.decided.models:
            await run.have(model)
        await run.load(model)
        await run.world.clock.advance(1.0)
