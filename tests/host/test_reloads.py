"""Reloads: another artifact or config in an instance's place, while requests wait and none fails."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import Instance, OperationKind, OperationState
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def refresh(run: Running, model: str, size: int = 300) -> None:
    """Bring a new revision of the model to disk."""
    content = {"config.json": b"{}", "model.safetensors": b"n" * (size - 2)}
    run.world.downloads.add(f"hf://org/{model}", content, predicted_bytes=size)
    await run.end(await run.host.transfers.download(model, refresh=True))


def instance(run: Running, model: str) -> Instance:
    found = run.host.registry.committed.instance_of(model)
    assert found is not None
    return found


def fp16(spec: ModelSpec) -> ModelSpec:
    return replace(spec, config=replace(spec.config, precision="fp16"))


async def test_a_new_revision_is_served_after_a_reload(world: World) -> None:
    """A refreshed model serves its old artifact until ReloadModel, then the new one."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        await refresh(run, "a")
        assert instance(run, "a").artifact_version == 1
        operation = await run.host.reloads.reload("a")
        assert operation.kind is OperationKind.RELOAD
        done = await run.end(operation)
        assert done.result["measured_bytes"] == 300
        assert instance(run, "a").artifact_version == 2
        assert run.host.occupancy.ledger.used("sim-0") == 300


async def test_requests_wait_during_a_reload(world: World) -> None:
    """Requests in flight end on the old instance, those that come meanwhile on the new; none fails."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        await refresh(run, "a")
        gate = run.workers.infer_gate("a")
        gate.close()
        infer = run.host.inference.infer
        before = [asyncio.ensure_future(infer("a", "", b"1", None)) for _ in range(3)]
        await gate.reached(3)
        operation = await run.host.reloads.reload("a")
        during = [asyncio.ensure_future(infer("a", "", b"2", None)) for _ in range(3)]
        await settle()
        assert run.host.operations.get(operation.id).state is OperationState.RUNNING
        gate.open()
        replies = await asyncio.gather(*before, *during)
        assert [r.payload for r in replies] == [b"1"] * 3 + [b"2"] * 3
        await run.end(operation)
        assert [v for v, *_ in run.workers.log if v != "infer"] == ["load", "unload", "load"]


async def test_a_model_that_is_not_loaded_is_loaded(world: World) -> None:
    """Reloading a model without an instance loads it."""
    async with world.host() as run:
        await run.have("a")
        await run.end(await run.host.reloads.reload("a"))
        assert set(run.workers.resident) == {"a"}


async def test_a_reload_takes_the_present_config(world: World) -> None:
    """An instance with an older config is stale until it is reloaded."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        await run.host.models.update("a", fp16)
        assert instance(run, "a").config_stale
        await run.end(await run.host.reloads.reload("a"))
        assert not instance(run, "a").config_stale


async def test_a_reload_during_a_load_takes_its_place(world: World) -> None:
    """A load that began with an older config begins anew, with the operations that wait for it."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        load = await run.host.residency.load("a")
        request = asyncio.ensure_future(run.host.inference.infer("a", "", b"x", None))
        await gate.reached()
        await run.host.models.update("a", fp16)
        reload = await run.host.reloads.reload("a")
        gate.open()
        await run.end(load)
        await run.end(reload)
        assert (await request).payload == b"x"
        assert not instance(run, "a").config_stale
        assert [verb for verb, *_ in run.workers.log if verb == "load"] == ["load", "load"]


async def test_a_reload_during_an_equal_load_joins_it(world: World) -> None:
    """A load that has just begun with the present config is not begun again."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        load = await run.host.residency.load("a")
        await gate.reached()
        reload = await run.host.reloads.reload("a")
        await settle()
        gate.open()
        await run.end(load)
        await run.end(reload)
        assert [verb for verb, *_ in run.workers.log] == ["load"]


async def test_equal_reloads_are_joined_until_they_load(world: World) -> None:
    """A second reload joins the first while that drains; once it loads with an older config, not."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        unload, load = run.workers.unload_gate("a"), run.workers.load_gate("a")
        unload.close()
        load.close()
        first = await run.host.reloads.reload("a")
        await unload.reached()
        second = await run.host.reloads.reload("a")
        assert first.id == second.id
        unload.open()
        await load.reached()
        await run.host.models.update("a", fp16)
        third = await run.host.reloads.reload("a")
        assert third.id != first.id
        load.open()
        await run.end(first)
        await run.end(third)
        assert not instance(run, "a").config_stale


async def test_a_rollback_lasts(world: World) -> None:
    """A chosen older version is what loads take, after an eviction and over a restart, until the next."""
    async with world.host() as run:
        await run.have("a")
        await refresh(run, "a")
        await run.end(await run.host.reloads.reload("a"))
        assert instance(run, "a").artifact_version == 2
        await run.end(await run.host.reloads.reload("a", version=1))
        await run.end(await run.host.residency.unload("a"))
        await run.load("a")
        assert instance(run, "a").artifact_version == 1
    async with world.host() as run:
        await run.load("a")
        assert instance(run, "a").artifact_version == 1
        await run.end(await run.host.reloads.reload("a"))
        assert instance(run, "a").artifact_version == 2


async def test_a_chosen_version_is_kept_on_disk(world: World) -> None:
    """The version rolled back to outlives newer downloads, and deleting its files ends the rollback."""
    async with world.host() as run:
        await run.have("a")
        await refresh(run, "a")
        await run.end(await run.host.reloads.reload("a", version=1))
        await run.end(await run.host.residency.unload("a"))
        for size in (310, 320, 330):
            await refresh(run, "a", size)
        versions = [a.version for a in run.host.models.get("a").artifacts]
        assert versions == [1, 4, 5]
        await run.end(await run.host.models.delete("a", force=False, keep_entry=True, version=1))
        await run.load("a")
        assert instance(run, "a").artifact_version == 5


async def test_what_cannot_be_reloaded_stays_in_service(world: World) -> None:
    """A version that is not there, or too large, is refused, and the old instance goes on serving."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        await refresh(run, "a", 5000)
        for version, reason in ((7, Reason.MODEL_NOT_DOWNLOADED), (0, Reason.MODEL_TOO_LARGE)):
            with pytest.raises(ModelhostError) as caught:
                await run.host.reloads.reload("a", version=version)
            assert caught.value.reason is reason
        assert (await run.host.inference.infer("a", "", b"x", DEADLINE_S)).payload == b"x"
        assert [verb for verb, *_ in run.workers.log if verb != "infer"] == ["load"]


class Once(dict[str, ModelhostError]):
    """Errors of which each is raised once."""

    def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
        """Return an error that is not there afterwards."""
        return self.pop(key, default)  # type: ignore[arg-type]


@pytest.mark.parametrize("newer", [False, True])
async def test_what_served_before_a_reload_that_fails_serves_again(
    world: World, newer: bool
) -> None:
    """With its config and its files; who waited meanwhile is answered, and the operation tells why it failed."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        await (refresh(run, "a") if newer else run.host.models.update("a", fp16))
        error = ModelhostError(Reason.LOAD_FAILED, "no", {"model": "a"})
        run.workers.load_errors = Once(a=error)
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.reloads.reload("a")
        request = asyncio.ensure_future(run.host.inference.infer("a", "", b"x", None))
        await gate.reached()
        assert (await run.failed(operation)).error is not None
        assert not request.done()
        gate.open()
        assert (await request).payload == b"x"
        await run.host.registry.flush()
        found = instance(run, "a")
        assert (found.artifact_version, found.config_stale) == (1, not newer)
        assert run.host.occupancy.ledger.used("sim-0") == 400
        assert [verb for verb, *_ in run.workers.log if verb == "load"] == ["load"] * 3
        # What is wanted is what stands in the registry: it is tried again when somebody asks for it.
        await run.end(await run.host.reloads.reload("a"))
        found = instance(run, "a")
        assert (found.artifact_version, found.config_stale) == (1 + newer, False)


async def test_a_failed_reload_tells_who_waits(world: World) -> None:
    """When the new load fails, the operation and the requests that waited carry its reason."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.unload_gate("a")
        gate.close()
        operation = await run.host.reloads.reload("a")
        await gate.reached()
        request = asyncio.ensure_future(run.host.inference.infer("a", "", b"x", None))
        await settle()
        error = ModelhostError(Reason.LOAD_FAILED, "no", {"model": "a"})
        run.workers.load_errors["a"] = error
        gate.open()
        done = await run.failed(operation)
        assert done.error is not None
        assert done.error.reason == "LOAD_FAILED"
        with pytest.raises(ModelhostError) as caught:
            await request
        assert caught.value.reason is Reason.LOAD_FAILED


async def test_a_reload_is_cancelled(world: World) -> None:
    """A cancelled reload ends CANCELLED; the model is loaded again by the next request."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.reloads.reload("a")
        await gate.reached()
        done = await run.host.operations.cancel(operation.id)
        assert done.state is OperationState.CANCELLED
        gate.open()
        assert (await run.host.inference.infer("a", "", b"x", DEADLINE_S)).payload == b"x"


async def test_a_reload_whose_commit_fails_changes_nothing(world: World) -> None:
    """When a reload cannot be stored the old instance stays, and so does the version that loads take."""
    async with world.host() as run:
        await run.have("a")
        await refresh(run, "a")
        await run.load("a")
        run.database.fail_commits()
        with pytest.raises(ModelhostError):
            await run.host.reloads.reload("a", version=1)
        assert run.host.registry.decided.models["a"].chosen_version == 0
        assert set(run.workers.resident) == {"a"}
        assert [verb for verb, *_ in run.workers.log] == ["load"]


async def test_a_reload_ends_where_its_model_is_deleted(world: World) -> None:
    """A reload that meets a forced deletion ends with it, and the model is gone."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.unload_gate("a")
        gate.close()
        reload = await run.host.reloads.reload("a")
        await gate.reached()
        delete = await run.host.models.delete("a", force=True)
        gate.open()
        await run.end(delete)
        after = await run.host.operations.wait(reload.id, timeout_s=DEADLINE_S)
        assert after.state in (OperationState.CANCELLED, OperationState.FAILED)
        await settle()
        assert not run.workers.resident
        assert not run.host.registry.decided.instances
