"""ResidencyService over a real socket: loads, plans, instances with what they do, pins."""

import asyncio
from pathlib import Path
from typing import Any

from modelhost.v1 import instances_pb2, model_service_pb2, operation_service_pb2, operations_pb2
from modelhost.v1 import residency_service_pb2 as pb
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Health
from tests.api.support import CALL_S, Served, failure, served
from tests.support import wait_until_async

NAME = "models/minilm"
INSTANCE = f"{NAME}/instances/-"
State = instances_pb2.Instance.State
Blocker = instances_pb2.InstanceActivity


async def _instance(it: Served, name: str = INSTANCE) -> instances_pb2.Instance:
    return await it.user.residency.GetInstance(pb.GetInstanceRequest(name=name), timeout=CALL_S)


async def _plan(it: Served, model: str, device: str = "") -> pb.PlanLoadResponse:
    request = pb.PlanLoadRequest(model=f"models/{model}", device=device)
    return await it.user.residency.PlanLoad(request, timeout=CALL_S)


async def test_a_model_is_loaded_shown_and_unloaded(tmp_path: Path) -> None:
    """LoadModel ends READY with its numbers, the instance shows them, UnloadModel frees them."""
    async with served(tmp_path) as it:
        await it.have()
        operation = await it.load()
        assert operation.load_result.device == "devices/sim-0"
        assert operation.load_result.measured_bytes == 400
        instance = await _instance(it)
        assert instance.name == operation.load_result.instance
        assert (instance.state, instance.tier) == (State.Value("READY"), 3)
        assert instance.health.status == instances_pb2.Health.HEALTHY
        assert instance.backend == "identity"
        assert instance.HasField("activity")
        assert await _instance(it, instance.name) == instance
        done = await it.end(
            await it.tcp.residency.UnloadModel(pb.UnloadModelRequest(name=NAME), timeout=CALL_S)
        )
        assert done.unload_result.freed_bytes == 400
        assert not it.running.workers.resident
        again = await it.tcp.residency.UnloadModel(pb.UnloadModelRequest(name=NAME), timeout=CALL_S)
        assert (await it.end(again)).unload_result.freed_bytes == 0


async def test_a_load_can_download_first(tmp_path: Path) -> None:
    """With `download` the LOAD shows the download's progress and ends READY; without it, it is refused."""
    async with served(tmp_path) as it:
        await it.add()
        found = await failure(it.tcp.residency.LoadModel(pb.LoadModelRequest(name=NAME)))
        assert found.reason == "MODEL_NOT_DOWNLOADED"
        assert "download it first" in found.message
        hold = it.running.world.downloads.hold("hf://org/minilm")
        request = pb.LoadModelRequest(name=NAME, download=True, request_id="one")
        load = await it.tcp.residency.LoadModel(request, timeout=CALL_S)
        await hold.reached.wait()
        assert (await it.tcp.residency.LoadModel(request, timeout=CALL_S)).name == load.name
        watch = it.tcp.operations.WatchOperation(
            operation_service_pb2.WatchOperationRequest(name=load.name), timeout=CALL_S
        )
        phases = operations_pb2.OperationProgress.Phase
        async for seen in watch:
            if seen.progress.phase == phases.Value("DOWNLOADING") and seen.progress.total_bytes:
                hold.release()
            last = seen
        assert last.state == operations_pb2.Operation.SUCCEEDED
        assert last.load_result.device == "devices/sim-0"
        kinds = [o.kind.value for o in it.host.operations.list()]
        assert sorted(kinds) == ["DOWNLOAD", "LOAD"]


async def test_a_failed_download_fails_its_load(tmp_path: Path) -> None:
    """The LOAD ends with the download's own error; cancelling a LOAD leaves the download alone."""
    async with served(tmp_path) as it:
        await it.add()
        error = ModelhostError(Reason.GATED, "accept the licence", {"source": "hf://org/minilm"})
        it.running.world.downloads.fail("hf://org/minilm", error)
        request = pb.LoadModelRequest(name=NAME, download=True)
        load = await it.tcp.residency.LoadModel(request, timeout=CALL_S)
        wait = operation_service_pb2.WaitOperationRequest(name=load.name)
        done = await it.tcp.operations.WaitOperation(wait, timeout=CALL_S)
        assert done.state == operations_pb2.Operation.FAILED
        assert (done.error.reason, done.error.code) == ("GATED", 9)
        hold = it.running.world.downloads.hold("hf://org/minilm")
        load = await it.tcp.residency.LoadModel(request, timeout=CALL_S)
        await hold.reached.wait()
        cancel = operation_service_pb2.CancelOperationRequest(name=load.name)
        done = await it.tcp.operations.CancelOperation(cancel, timeout=CALL_S)
        assert done.state == operations_pb2.Operation.CANCELLED
        hold.release()
        await wait_until_async(lambda: it.host.models.get("minilm").available is not None)
        assert not it.running.workers.resident


async def test_a_plan_says_what_a_load_would_do(tmp_path: Path) -> None:
    """Fits, evicts, is loaded already, is refused: each with the bytes; and nothing happens."""
    async with served(tmp_path) as it:
        for name, size in (("a", 400), ("b", 500), ("c", 400), ("huge", 2000)):
            await it.have(name, size)
        fits = await _plan(it, "a")
        assert (fits.placement.device, len(fits.placement.victims)) == ("devices/sim-0", 0)
        assert (fits.needed_bytes, fits.free_bytes, fits.budget_bytes) == (400, 1000, 1000)
        await it.load("a")
        await it.load("b")
        loaded = await _plan(it, "a")
        assert loaded.placement.loaded
        assert loaded.placement.source_tier == instances_pb2.Instance.DEVICE
        evicts = await _plan(it, "c")
        assert [v.model for v in evicts.placement.victims] == ["models/a"]
        victim = evicts.placement.victims[0]
        assert (victim.freed_bytes, victim.busy) == (400, False)
        assert (evicts.free_bytes, evicts.evictable_bytes) == (100, 900)
        huge = await _plan(it, "huge")
        assert huge.refusal.reason == "MODEL_TOO_LARGE"
        assert huge.refusal.metadata["budgetBytes"] == "1000"
        for name in ("a", "b"):
            await it.admin.residency.PinModel(
                pb.PinModelRequest(name=f"models/{name}"), timeout=CALL_S
            )
        held = await _plan(it, "c")
        assert held.refusal.reason == "OUT_OF_DEVICE_MEMORY"
        assert held.refusal.metadata["heldBy"] == "a,b"
        await it.add("absent")
        assert (await _plan(it, "absent")).refusal.reason == "MODEL_NOT_DOWNLOADED"
        found = await failure(
            it.tcp.residency.PlanLoad(pb.PlanLoadRequest(model=NAME, device="devices/no"))
        )
        assert found.reason == "MODEL_NOT_FOUND"
        found = await failure(
            it.tcp.residency.PlanLoad(pb.PlanLoadRequest(model="models/a", device="devices/no"))
        )
        assert found.reason == "DEVICE_NOT_FOUND"
        assert sorted(it.running.workers.resident) == ["a", "b"]


async def test_a_plan_names_the_busy_ones_it_would_wait_for(tmp_path: Path) -> None:
    """Where only busy models are in the way, they are the victims, marked busy."""
    async with served(tmp_path) as it:
        await it.have("a", 800)
        await it.have("b", 800)
        await it.load("a")
        gate = it.running.workers.infer_gate("a")
        gate.close()
        request = asyncio.ensure_future(it.host.inference.infer("a", "", b"x", CALL_S))
        await gate.reached()
        plan = await _plan(it, "b")
        assert [(v.model, v.busy) for v in plan.placement.victims] == [("models/a", True)]
        gate.open()
        await request


async def test_an_instance_shows_what_it_does(tmp_path: Path) -> None:
    """In flight, last use, expiry, rank and blockers follow requests, pins and keep_alive."""
    async with served(tmp_path) as it:
        await it.have("a", 400)
        await it.have("b", 400)
        model = model_service_pb2.UpdateModelRequest()
        model.model.name = "models/a"
        model.model.config.keep_alive.seconds = 100
        await it.tcp.models.UpdateModel(model, timeout=CALL_S)
        await it.load("a")
        await it.running.world.clock.advance(1.0)
        await it.load("b")
        await it.running.world.clock.advance(1.0)
        gate = it.running.workers.infer_gate("a")
        gate.close()
        request = asyncio.ensure_future(it.host.inference.infer("a", "", b"x", CALL_S))
        await gate.reached()
        activity = (await _instance(it, "models/a/instances/-")).activity
        assert activity.in_flight == 1
        assert list(activity.evict_blockers) == [Blocker.IN_FLIGHT]
        assert activity.eviction_rank == 0
        gate.open()
        await request
        activity = (await _instance(it, "models/a/instances/-")).activity
        assert (activity.request_count, activity.error_count) == (1, 0)
        assert activity.expire_time.seconds - activity.last_used_time.seconds == 100
        listed = await it.tcp.residency.ListInstances(pb.ListInstancesRequest(), timeout=CALL_S)
        ranks = {i.model: i.activity.eviction_rank for i in listed.instances}
        assert ranks == {"models/b": 1, "models/a": 2}
        pin = pb.PinModelRequest(name="models/b")
        await it.admin.residency.PinModel(pin, timeout=CALL_S)
        activity = (await _instance(it, "models/b/instances/-")).activity
        assert list(activity.evict_blockers) == [Blocker.PINNED]
        unpin = pb.UnpinModelRequest(name="models/b")
        assert not (await it.admin.residency.UnpinModel(unpin, timeout=CALL_S)).pinned


async def test_instances_are_listed_by_model_device_and_state(tmp_path: Path) -> None:
    """Each filter narrows the list, and pages continue it."""
    async with served(tmp_path, devices=2) as it:
        for name, device in (("a", "sim-0"), ("b", "sim-1"), ("c", "sim-0")):
            await it.have(name)
            request = pb.LoadModelRequest(name=f"models/{name}", device=f"devices/{device}")
            await it.end(await it.tcp.residency.LoadModel(request, timeout=CALL_S))

        async def found(**filters: Any) -> list[str]:
            request = pb.ListInstancesRequest(**filters)
            page = await it.tcp.residency.ListInstances(request, timeout=CALL_S)
            return [i.model.removeprefix("models/") for i in page.instances]

        assert await found() == ["a", "b", "c"]
        assert await found(model="models/b") == ["b"]
        assert await found(device="devices/sim-0") == ["a", "c"]
        assert await found(states=[State.Value("READY")], page_size=2) == ["a", "b"]
        assert await found(states=[State.Value("FAILED")]) == []


async def test_a_check_says_what_a_real_inference_said(tmp_path: Path) -> None:
    """A bad verdict is an answer with its reason, kept by the instance; a check is no use of the model."""
    async with served(tmp_path) as it:
        await it.have()
        await it.load()
        before = (await _instance(it)).activity.last_used_time
        it.running.workers.healths["minilm"] = (Health.UNHEALTHY, "wrong numbers")
        request = pb.CheckInstanceRequest(name=INSTANCE)
        checked = await it.user.residency.CheckInstance(request, timeout=CALL_S)
        assert checked.health.status == instances_pb2.Health.UNHEALTHY
        assert checked.health.message == "wrong numbers"
        assert checked.health.HasField("check_time")
        after = await _instance(it)
        assert after.health == checked.health
        assert after.activity.last_used_time == before


async def test_a_reload_brings_the_present_config(tmp_path: Path) -> None:
    """A config change that needs a reload shows as stale, and ReloadModel makes a new instance of it."""
    async with served(tmp_path) as it:
        await it.have()
        await it.load()
        change = model_service_pb2.UpdateModelRequest()
        change.model.name = NAME
        change.model.config.max_batch_size = 4
        await it.tcp.models.UpdateModel(change, timeout=CALL_S)
        before = await _instance(it)
        assert before.config_stale
        request = pb.ReloadModelRequest(name=NAME, request_id="again")
        operation = await it.tcp.residency.ReloadModel(request, timeout=CALL_S)
        done = await it.end(operation)
        after = await _instance(it)
        assert done.kind == operations_pb2.Operation.RELOAD
        assert done.load_result.instance == after.name != before.name
        assert not after.config_stale
        assert after.generation > before.generation
        repeated = await it.tcp.residency.ReloadModel(request, timeout=CALL_S)
        assert repeated.name == operation.name
        for version, reason in ((-1, "INVALID_ARGUMENT"), (7, "MODEL_NOT_DOWNLOADED")):
            request = pb.ReloadModelRequest(name=NAME, version=version)
            assert (await failure(it.tcp.residency.ReloadModel(request))).reason == reason


async def test_a_blocked_model_can_be_unblocked(tmp_path: Path) -> None:
    """Five crashes block a model; UnblockModel lets it be loaded again."""
    async with served(tmp_path) as it:
        await it.have()
        for _ in range(5):
            await it.load()
            it.running.blame("minilm", stderr_tail="boom")
            await wait_until_async(
                lambda: it.host.routes.get("minilm") is None or it.host.routes.get("minilm").open
            )
        found = await failure(it.tcp.residency.LoadModel(pb.LoadModelRequest(name=NAME)))
        assert found.reason == "MODEL_BLOCKED"
        assert found.metadata["crashes"] == "5"
        instance = await _instance(it)
        assert instance.state == State.Value("BLOCKED")
        assert instance.error.reason == "MODEL_BLOCKED"
        unblock = pb.UnblockModelRequest(name=NAME)
        assert (await it.tcp.residency.UnblockModel(unblock, timeout=CALL_S)).name == NAME
        await it.load()
