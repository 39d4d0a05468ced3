"""The host tier over a real socket: warm instances, plans that say what goes where, budgets, unloads."""

from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from modelhost.v1 import (
    host_service_pb2,
    instances_pb2,
    model_service_pb2,
    settings_pb2,
)
from modelhost.v1 import residency_service_pb2 as pb
from tests.api.support import CALL_S, Served, failure, served

Instance = instances_pb2.Instance


async def _settings(it: Served, paths: list[str], **values: object) -> settings_pb2.Settings:
    request = host_service_pb2.UpdateSettingsRequest(settings=settings_pb2.Settings(**values))  # type: ignore[arg-type]
    request.update_mask.paths.extend(paths)
    return await it.admin.host.UpdateSettings(request, timeout=CALL_S)


async def _have(it: Served, *models: str) -> None:
    """Have models, and host memory for all of them, on a device that holds two of 400 bytes."""
    await _settings(it, ["host_budget_bytes"], host_budget_bytes=4000)
    for model in models:
        await it.have(model)


async def _unload(it: Served, model: str, **how: bool) -> object:
    request = pb.UnloadModelRequest(name=f"models/{model}", **how)
    done = await it.end(await it.tcp.residency.UnloadModel(request, timeout=CALL_S))
    return done.unload_result


async def _instance(it: Served, model: str) -> instances_pb2.Instance:
    request = pb.GetInstanceRequest(name=f"models/{model}/instances/-")
    return await it.user.residency.GetInstance(request, timeout=CALL_S)


async def test_a_warm_model_is_shown_and_comes_back(tmp_path: Path) -> None:
    """`keep_warm` leaves the model WARM with its bytes of host memory; LoadModel swaps it in; the rest frees it."""
    async with served(tmp_path) as it:
        await _have(it, "a")
        await it.load("a")
        result = await _unload(it, "a", keep_warm=True)
        assert (result.freed_bytes, result.freed_host_bytes, result.warm) == (400, 0, True)  # type: ignore[attr-defined]
        warm = await _instance(it, "a")
        assert (warm.state, warm.tier, warm.host_bytes) == (Instance.WARM, Instance.HOST, 400)
        assert warm.activity.eviction_rank == 1
        assert not warm.activity.evict_blockers
        loaded = await it.load("a")
        assert loaded.load_result.source_tier == Instance.HOST
        assert loaded.load_result.instance == warm.name
        result = await _unload(it, "a", force=True)
        assert (result.freed_bytes, result.freed_host_bytes, result.warm) == (400, 400, False)  # type: ignore[attr-defined]


async def test_a_copy_says_nothing_of_its_models_place_on_the_device(tmp_path: Path) -> None:
    """A READY model has its device's rank and blockers, whatever becomes of its copy; a WARM one its place among copies."""
    async with served(tmp_path) as it:
        await _have(it, "a", "b", "c")
        for model in "abc":
            await it.load(model)
            await it.running.world.clock.advance(1.0)
        await it.host.models.pin("b", pinned=True)
        found = {model: (await _instance(it, model)).activity for model in "abc"}
        assert list(found["b"].evict_blockers) == [instances_pb2.InstanceActivity.PINNED]
        assert {m: a.eviction_rank for m, a in found.items()} == {"a": 1, "b": 0, "c": 1}


async def test_a_plan_says_what_goes_where(tmp_path: Path) -> None:
    """PlanLoad names source and victims with the tier after, and whose copies would be dropped for it."""
    async with served(tmp_path) as it:
        await _have(it, "a", "b", "c")
        for model in "ab":
            await it.load(model)
            await it.running.world.clock.advance(1.0)
        request = pb.PlanLoadRequest(model="models/c")
        planned = await it.user.residency.PlanLoad(request, timeout=CALL_S)
        (victim,) = planned.placement.victims
        assert (victim.model, victim.tier_after) == ("models/a", Instance.HOST)
        assert planned.placement.source_tier == Instance.DISK
        assert planned.placement.host_bytes == 400
        assert not planned.placement.dropped
        assert planned.host_tier.used_bytes == 800
        await it.load("c")
        await _settings(it, ["host_budget_bytes"], host_budget_bytes=1200)
        back = await it.user.residency.PlanLoad(
            pb.PlanLoadRequest(model="models/a"), timeout=CALL_S
        )
        assert back.placement.source_tier == Instance.HOST
        await it.have("d")
        request = pb.PlanLoadRequest(model="models/d")
        planned = await it.user.residency.PlanLoad(request, timeout=CALL_S)
        assert [v.model for v in planned.placement.dropped] == ["models/a"]
        assert planned.placement.dropped[0].tier_after == Instance.DISK


async def test_a_plan_says_whose_copy_goes_while_it_stays(tmp_path: Path) -> None:
    """A copy beside a device that a load would take the place of is told with DEVICE: its model serves on."""
    async with served(tmp_path) as it:
        await _have(it, "a", "b")
        await _settings(it, ["host_budget_bytes"], host_budget_bytes=400)
        await it.load("a")
        await it.running.world.clock.advance(1.0)
        request = pb.PlanLoadRequest(model="models/b")
        planned = await it.user.residency.PlanLoad(request, timeout=CALL_S)
        (dropped,) = planned.placement.dropped
        assert (dropped.model, dropped.tier_after) == ("models/a", Instance.DEVICE)
        assert not planned.placement.victims
        await it.load("b")
        found = [await _instance(it, model) for model in "ab"]
        assert [(i.state, i.host_bytes) for i in found] == [
            (Instance.READY, 0),
            (Instance.READY, 400),
        ]


async def test_the_host_tier_is_shown(tmp_path: Path) -> None:
    """ListDevices and GetStatistics have the tier's budget and use, settings its budget and keep_alive."""
    async with served(tmp_path) as it:
        await _have(it, "a")
        await it.load("a")
        request = host_service_pb2.ListDevicesRequest()
        tier = (await it.user.host.ListDevices(request, timeout=CALL_S)).host_tier
        assert (tier.budget_bytes, tier.capacity_bytes) == (4000, 4000)
        assert (tier.used_bytes, tier.warm_bytes, tier.free_bytes) == (400, 0, 3600)
        await _unload(it, "a", keep_warm=True)
        request = host_service_pb2.GetStatisticsRequest()
        seen = await it.user.host.GetStatistics(request, timeout=CALL_S)
        assert (seen.host_tier_bytes, seen.host_tier_budget_bytes) == (400, 4000)
        (instance,) = seen.instances
        assert (instance.device_bytes, instance.host_bytes) == (0, 400)
        (device,) = seen.devices
        assert device.resident_bytes == 0
        changed = await _settings(it, ["host_keep_alive"], host_keep_alive=Duration(seconds=9))
        assert changed.host_keep_alive.seconds == 9
        assert (await _instance(it, "a")).activity.HasField("expire_time")
        none = await _settings(it, ["host_budget_bytes"], host_budget_bytes=0)
        assert none.HasField("host_budget_bytes")
        back = await _settings(it, ["host_budget_bytes"])
        assert not back.HasField("host_budget_bytes")


@pytest.mark.parametrize("budget", [-1, (1 << 50) + 1])
async def test_a_budget_out_of_range_is_refused(tmp_path: Path, budget: int) -> None:
    """A budget below 0 or above 2^50 changes nothing."""
    async with served(tmp_path) as it:
        request = host_service_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(host_budget_bytes=budget)
        )
        found = await failure(it.admin.host.UpdateSettings(request))
        assert found.reason == "INVALID_ARGUMENT"
        assert found.metadata["field"] == "settings.host_budget_bytes"


async def test_a_model_keeps_its_own_times(tmp_path: Path) -> None:
    """`host_keep_alive` and `fallback_model` of a config come back as they were sent; itself is no fallback."""
    async with served(tmp_path) as it:
        await it.add("a")
        request = model_service_pb2.UpdateModelRequest()
        request.model.name = "models/a"
        request.model.config.host_keep_alive.seconds = 7
        request.model.config.fallback_model = "models/b"
        request.update_mask.paths.extend(["config.host_keep_alive", "config.fallback_model"])
        config = (await it.tcp.models.UpdateModel(request, timeout=CALL_S)).config
        assert (config.host_keep_alive.seconds, config.fallback_model) == (7, "models/b")
        request.model.config.fallback_model = "models/a"
        found = await failure(it.tcp.models.UpdateModel(request))
        assert found.metadata["field"] == "model.config.fallback_model"
