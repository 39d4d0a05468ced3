"""What every implementation of the Workers port does with the host tier, real processes and fake alike."""

import asyncio
import dataclasses

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.ports import LoadSpec
from tests.fakes.workers import FakeWorkers
from tests.support import wait_until_async
from tests.worker import stored_backend
from tests.worker.harness import (
    CONFIG,
    DEADLINE_S,
    Listener,
    ProcessWorkers,
    decode,
    encode,
    ignore,
    spec,
)

BACKENDS = (
    "awkward = tests.worker.torch_backend:TorchBackend",
    "stored = tests.worker.stored_backend:StoredBackend",
)
FAKE_BYTES = 4096


@pytest.fixture(params=["fake", "real"])
async def workers(request):
    """Give each implementation, with a backend whose models can be imaged."""
    if request.param == "fake":
        made = FakeWorkers()
    else:
        made = ProcessWorkers(dataclasses.replace(CONFIG, backends=(*CONFIG.backends, *BACKENDS)))
    made.listener = Listener()
    made.set_listener(made.listener)
    yield made
    async with asyncio.timeout(DEADLINE_S):
        await made.stop(1.0)


def imaged(model: str = "m", **more) -> LoadSpec:
    """Return what is loaded: a model with an image, of ``FAKE_BYTES`` where it is a fake's."""
    made = spec(model, backend="awkward", **more)
    return dataclasses.replace(made, predicted_bytes=FAKE_BYTES)


async def infer(workers, model: str = "m") -> bytes:
    """Return what the instance answers on ``sim-0``."""
    payload = encode({}, name=model)
    reply = await workers.infer("sim-0", f"{model}-1", 1, payload, timeout_s=None)
    return decode(reply.payload)[0].SerializeToString()


async def refused(awaitable) -> Reason:
    """Return the reason with which it fails."""
    with pytest.raises(ModelhostError) as caught:
        await awaitable
    return caught.value.reason


async def test_demoted_and_promoted_it_answers_as_before(workers):
    """A demotion keeps the image's bytes, a promotion brings back the same instance with the same answers."""
    loaded = await workers.load("sim-0", imaged(), ignore)
    assert loaded.host_bytes == loaded.measured_bytes > 0
    before = await infer(workers)
    for _ in range(3):
        assert await workers.demote("sim-0", "m-1", 1) == loaded.host_bytes
        assert await refused(infer(workers)) is Reason.MODEL_NOT_LOADED
        back = await workers.promote("sim-0", "m-1", 1, ignore)
        assert dataclasses.replace(back, load_s=loaded.load_s) == loaded
        assert await infer(workers) == before


async def test_a_demotion_is_idempotent_and_so_is_a_promotion(workers):
    """Asked twice, both say the same; of what is unknown nothing is kept, and nothing can come back."""
    loaded = await workers.load("sim-0", imaged(), ignore)
    assert (await workers.promote("sim-0", "m-1", 1, ignore)).host_bytes == loaded.host_bytes
    for _ in range(2):
        assert await workers.demote("sim-0", "m-1", 1) == loaded.host_bytes
    for instance, generation in (("m-1", 2), ("never", 1)):
        assert await workers.demote("sim-0", instance, generation) == 0
        reason = await refused(workers.promote("sim-0", instance, generation, ignore))
        assert reason is Reason.MODEL_NOT_LOADED
    assert await refused(workers.promote("cuda-7", "m-1", 1, ignore)) is Reason.WORKER_LOST


async def test_an_unload_frees_both_tiers(workers):
    """A warm instance is unloaded as any other; afterwards there is nothing to promote."""
    await workers.load("sim-0", imaged(), ignore)
    await workers.demote("sim-0", "m-1", 1)
    for _ in range(2):
        await workers.unload("sim-0", "m-1", 1)
    assert await refused(workers.promote("sim-0", "m-1", 1, ignore)) is Reason.MODEL_NOT_LOADED
    await workers.load("sim-0", imaged(generation=2), ignore)


@pytest.mark.parametrize("device", ["cpu", "sim-0"])
async def test_what_cannot_be_kept_warm_is_unloaded_whole(workers, device):
    """On ``cpu``, and where no image may be kept, host_bytes is 0 and a demotion frees the instance."""
    spec = imaged() if device == "cpu" else dataclasses.replace(imaged(), keep_image=False)
    loaded = await workers.load(device, spec, ignore)
    assert (loaded.host_bytes, loaded.measured_bytes > 0) == (0, True)
    assert await workers.demote(device, "m-1", 1) == 0
    assert await refused(workers.promote(device, "m-1", 1, ignore)) is Reason.MODEL_NOT_LOADED
    await workers.load(device, imaged(generation=2), ignore)


async def test_one_model_is_demoted_while_another_serves(workers):
    """Moves of one instance touch no other."""
    await workers.load("sim-0", imaged("a", seed=1), ignore)
    await workers.load("sim-0", imaged("b", seed=2), ignore)
    before = await infer(workers, "b")
    for _ in range(3):
        await workers.demote("sim-0", "a-1", 1)
        assert await infer(workers, "b") == before
        await workers.promote("sim-0", "a-1", 1, ignore)
        assert await infer(workers, "b") == before


async def test_a_copy_goes_and_its_model_answers_on(workers):
    """Dropped, once or twice, a copy is nothing that a demotion could keep; the model on the device answers as before."""
    await workers.load("sim-0", imaged("a", seed=1), ignore)
    await workers.load("sim-0", imaged("b", seed=2), ignore)
    before = [await infer(workers, model) for model in "ab"]
    for _ in range(2):
        assert await workers.drop_copy("sim-0", "a-1", 1) == 0
    assert [await infer(workers, model) for model in "ab"] == before
    assert (await workers.promote("sim-0", "a-1", 1, ignore)).host_bytes == 0
    assert await workers.demote("sim-0", "b-1", 1) > 0
    assert await workers.demote("sim-0", "a-1", 1) == 0
    reason = await refused(workers.promote("sim-0", "a-1", 1, ignore))
    assert reason is Reason.MODEL_NOT_LOADED
    assert (await workers.load("sim-0", imaged("a", generation=2, seed=1), ignore)).host_bytes > 0


async def test_only_what_is_beside_a_device_is_a_copy(workers):
    """Nothing is dropped of what is warm, of what is on ``cpu``, and of what is not there."""
    loaded = await workers.load("sim-0", imaged(), ignore)
    assert await workers.demote("sim-0", "m-1", 1) == loaded.host_bytes
    assert await workers.drop_copy("sim-0", "m-1", 1) == loaded.host_bytes
    assert (await workers.promote("sim-0", "m-1", 1, ignore)).host_bytes == loaded.host_bytes
    await workers.load("cpu", imaged(), ignore)
    payload = encode({}, name="m")
    for device, generation in (("cpu", 1), ("sim-0", 7), ("cuda-7", 1)):
        assert await workers.drop_copy(device, "m-1", generation) == 0
    await workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
    await infer(workers)


async def test_images_end_with_their_worker(workers):
    """After a crash neither what was resident nor what was warm can be promoted, where it is not from files."""
    await workers.load("sim-0", imaged("a"), ignore)
    await workers.load("sim-0", imaged("b"), ignore)
    await workers.demote("sim-0", "a-1", 1)
    if isinstance(workers, FakeWorkers):
        workers.crash("sim-0")
    else:
        (worker,) = workers._workers()
        worker.kill("signal SIGKILL")
    await workers.listener.wait(exits=1, ready=2)
    for instance in ("a-1", "b-1"):
        assert await workers.demote("sim-0", instance, 1) == 0
        reason = await refused(workers.promote("sim-0", instance, 1, ignore))
        assert reason is Reason.MODEL_NOT_LOADED


async def test_a_cancelled_promotion_leaves_it_warm(workers):
    """Cancelled at once, a promotion has not happened, and a later one succeeds."""
    loaded = await workers.load("sim-0", imaged(), ignore)
    await workers.demote("sim-0", "m-1", 1)
    promotion = asyncio.create_task(workers.promote("sim-0", "m-1", 1, ignore))
    await asyncio.sleep(0)
    promotion.cancel()
    with pytest.raises(asyncio.CancelledError):
        await promotion
    assert await refused(infer(workers)) is Reason.MODEL_NOT_LOADED
    assert (await workers.promote("sim-0", "m-1", 1, ignore)).host_bytes == loaded.host_bytes
    await infer(workers)


async def test_images_that_were_at_rest_outlive_their_worker(workers, tmp_path):
    """What was resident and what was warm comes back by ``promote``, counted as adopted; what is unloaded before is gone."""
    folder = stored_backend.write(tmp_path, 1)
    specs = [imaged(m, generation=g) for g, m in enumerate("abc", 1)]
    config = dataclasses.replace(specs[0].config, backend="stored")
    for made in specs:
        stored = dataclasses.replace(made, model_dir=folder, config=config)
        await workers.load("sim-0", stored, ignore)
    assert await workers.demote("sim-0", "a-1", 1)
    if isinstance(workers, FakeWorkers):
        workers.leavings.outliving = set("abc")
        workers.crash("sim-0")
    else:
        (worker,) = workers._workers()
        await wait_until_async(lambda: workers.at_rest("sim-0") == len(specs))
        worker.kill("signal SIGKILL")
    await workers.listener.wait(exits=1)
    (end,) = workers.listener.exits
    assert set(end.kept) == {("a-1", 1), ("b-1", 2), ("c-1", 3)}
    assert workers.unowned_bytes() == sum(end.kept.values()) > 0
    assert await workers.demote("sim-0", "b-1", 2) == end.kept["b-1", 2]
    await workers.unload("sim-0", "c-1", 3)
    for instance, generation in (("a-1", 1), ("b-1", 2)):
        back = await workers.promote("sim-0", instance, generation, ignore)
        assert back.adopted_bytes == end.kept[instance, generation] <= back.host_bytes
        again = await workers.promote("sim-0", instance, generation, ignore)
        assert again.host_bytes == back.host_bytes
    await infer(workers, "a")
    assert workers.unowned_bytes() == 0
    assert await refused(workers.promote("sim-0", "c-1", 3, ignore)) is Reason.MODEL_NOT_LOADED
