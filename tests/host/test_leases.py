"""Leases: what they hold, and every way in which they end."""

from functools import partial
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.leases import PER_PRINCIPAL_MAX
from modelhostd.core.resources import Kind, Lease, Settings
from modelhostd.host.registry import Request
from tests.host.support import Running, World


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def leases(run: Running) -> list[Lease]:
    return list(run.host.registry.committed.leases.values())


async def test_a_leased_model_is_not_evicted(world: World) -> None:
    """A load that would need a leased model's memory is refused with its name, until the lease ends."""
    async with world.host(budget=500) as run:
        await run.have("a")
        await run.have("b")
        await run.load("a")
        lease = await run.host.leases.acquire("a", 10.0, "me")
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("b")
        assert caught.value.reason is Reason.OUT_OF_DEVICE_MEMORY
        assert caught.value.metadata["heldBy"] == "a"
        assert "a (400, leased)" in caught.value.message
        await run.host.leases.release(lease.id, "me")
        await run.load("b")
        assert set(run.workers.resident) == {"b"}
        assert run.reasons("leases") == ["ACQUIRED", "RELEASED"]


async def test_a_lost_client_s_lease_ends(world: World) -> None:
    """When its time is up a lease is gone, with an event, and what it held may be evicted."""
    async with world.host(budget=500) as run:
        await run.have("a")
        await run.have("b")
        await run.load("a")
        lease = await run.host.leases.acquire("a", 10.0, "me")
        await world.clock.advance(9.5)
        assert leases(run) == [lease]
        await world.clock.advance(1.0)
        assert not leases(run)
        assert run.reasons("leases") == ["ACQUIRED", "EXPIRED"]
        await run.load("b")
        with pytest.raises(ModelhostError) as caught:
            await run.host.leases.renew(lease.id, 10.0)
        assert caught.value.reason is Reason.LEASE_NOT_FOUND
        await run.host.leases.release(lease.id)


async def test_renewing_counts_anew(world: World) -> None:
    """A renewed lease lasts as long from then as its client says, longer or shorter."""
    async with world.host() as run:
        await run.have("a")
        lease = await run.host.leases.acquire("a", None, "me")
        assert lease.expire_time == world.clock.time() + 60
        await world.clock.advance(50.0)
        renewed = await run.host.leases.renew(lease.id, 60.0, "me")
        assert renewed.expire_time == world.clock.time() + 60
        await world.clock.advance(50.0)
        assert leases(run) == [renewed]
        await run.host.leases.renew(lease.id, 1.0, "me")
        await world.clock.advance(1.5)
        assert not leases(run)


async def test_several_leases_hold_until_the_last_ends(world: World) -> None:
    """The end of one lease leaves what another one on the same model holds."""
    async with world.host(budget=500) as run:
        await run.have("a")
        await run.have("b")
        await run.load("a")
        one = await run.host.leases.acquire("a", 100.0, "me")
        await run.host.leases.acquire("a", 10.0, "you")
        await run.host.leases.release(one.id)
        with pytest.raises(ModelhostError):
            await run.host.residency.load("b")
        await world.clock.advance(11.0)
        await run.load("b")


async def test_keep_alive_waits_for_the_lease(world: World) -> None:
    """An idle model stays as long as a lease holds it, and goes soon after."""
    async with world.host() as run:
        await run.host.update_settings(Settings(keep_alive_s=5.0), ["keep_alive_s"])
        await run.have("a")
        await run.load("a")
        await run.host.leases.acquire("a", 20.0, "me")
        await world.clock.advance(19.0)
        assert set(run.workers.resident) == {"a"}
        await world.clock.advance(2.0)
        assert not run.workers.resident


async def test_an_unload_goes_on_all_the_same(world: World) -> None:
    """A lease forbids eviction, not what an operator asks for; it stays, and so does its end."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        lease = await run.host.leases.acquire("a", 60.0, "me")
        await run.end(await run.host.residency.unload("a"))
        assert not run.workers.resident
        assert leases(run) == [lease]


async def test_a_deleted_model_takes_its_leases_with_it(world: World) -> None:
    """Nothing holds a model that is no more, nor the next one of that name."""
    async with world.host() as run:
        await run.have("a")
        lease = await run.host.leases.acquire("a", 60.0, "me")
        await run.end(await run.host.models.delete("a", force=True))
        assert not leases(run)
        assert run.reasons("leases") == ["ACQUIRED", "MODEL_DELETED"]
        with pytest.raises(ModelhostError):
            await run.host.leases.renew(lease.id, 60.0)
        with pytest.raises(ModelhostError) as caught:
            await run.host.leases.acquire("a", 60.0)
        assert caught.value.reason is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("crashed", [False, True])
async def test_no_lease_outlives_the_daemon(world: World, crashed: bool) -> None:
    """The next daemon tells that a lease is gone, after a stop and after a crash."""
    async with world.host() as run:
        await run.have("a")
        await run.host.leases.acquire("a", 60.0, "me")
        if crashed:
            await run.crash()
    async with world.host() as run:
        assert not leases(run)
    told = [event.reason for event, _, _ in world.disk.events.values() if event.kind is Kind.LEASE]
    assert told == ["ACQUIRED", "DAEMON_RESTARTED"]


async def test_a_repeated_request_is_one_lease(world: World) -> None:
    """The same request id gives the same lease; when that has ended, the caller is told so."""
    async with world.host() as run:
        await run.have("a")
        request = Request("once", "content")
        lease = await run.host.leases.acquire("a", 60.0, "me", request)
        assert await run.host.leases.acquire("a", 60.0, "me", request) == lease
        assert leases(run) == [lease]
        await run.host.leases.release(lease.id)
        with pytest.raises(ModelhostError) as caught:
            await run.host.leases.acquire("a", 60.0, "me", request)
        assert caught.value.reason is Reason.LEASE_NOT_FOUND


async def test_a_change_that_cannot_be_stored_is_none(world: World) -> None:
    """Where the commit fails an acquired lease holds nothing, and a released or renewed one as before."""
    async with world.host() as run:
        await run.have("a")
        lease = await run.host.leases.acquire("a", 10.0, "me")
        for call in (
            partial(run.host.leases.acquire, "a", 60.0, "me"),
            partial(run.host.leases.renew, lease.id, 60.0),
            partial(run.host.leases.release, lease.id),
        ):
            run.database.fail_commits()
            with pytest.raises(ModelhostError) as caught:
                await call()
            assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
            assert leases(run) == [lease]
        await world.clock.advance(11.0)
        assert not leases(run)


async def test_one_caller_cannot_take_all(world: World) -> None:
    """Leases are counted per caller, and refused beyond a limit; others are not held up."""
    async with world.host() as run:
        await run.have("a")
        table = {str(n): Lease(str(n), "a", "me", 1.0, 2e9) for n in range(PER_PRINCIPAL_MAX)}
        for key, lease in table.items():
            run.host.registry.decided.put(Kind.LEASE, key, lease)
        with pytest.raises(ModelhostError) as caught:
            await run.host.leases.acquire("a", 60.0, "me")
        assert caught.value.reason is Reason.QUEUE_FULL
        assert caught.value.metadata["queue"] == "leases"
        await run.host.leases.acquire("a", 60.0, "you")


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 0.99, 86_401.0, 1e18])
async def test_a_time_to_live_has_a_range(world: World, ttl_s: float) -> None:
    """Neither a lease that ends at once nor one for ever; the message says the range."""
    async with world.host() as run:
        await run.have("a")
        with pytest.raises(ModelhostError) as caught:
            await run.host.leases.acquire("a", ttl_s, "me")
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert "1 s to 86400 s" in caught.value.message
        assert not leases(run)
