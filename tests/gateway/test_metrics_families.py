"""What the families say of a host: right numbers, bounded labels, nothing that holds the loop."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.rpc_stats import RpcStats
from modelhostd.core.tallies import Tallies
from modelhostd.gateway.exposition import PIECE
from modelhostd.gateway.metrics import CODES, families
from modelhostd.gateway.sources import Sources
from modelhostd.host import Host
from modelhostd.ports import WorkerExit
from tests.gateway.support import samples, value
from tests.host.support import MODEL_BYTES, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Everything outside the host."""
    return World(tmp_path)


def sources_of(host: Host, **given: object) -> Sources:
    """Return sources that follow the host from now on."""
    tallies = Tallies(host.registry.committed.models.values())
    host.registry.subscribe(tallies.fold)
    return Sources(host, RpcStats(), tallies, **given)  # type: ignore[arg-type]


def shown(sources: Sources) -> str:
    """Return the whole exposition."""
    return "".join(families(sources))


async def test_every_family_is_valid_and_new(world: World) -> None:
    """Prometheus' parser takes it all, each family stands there once, each with help."""
    async with world.host() as running:
        sources = sources_of(running.host, build={"version": "1"})
        await running.have("a")
        await running.load("a")
        await running.host.inference.infer("a", "", b"x", None)
        text = shown(sources)
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert text.count("# HELP") == len(names)
    assert text.endswith("\n")
    found = samples(text)
    assert found["modelhost_build_info"] == {(("version", "1"),): 1}
    prefixes = ("grpc_server_", "modelhost_", "process_")
    assert all(name.startswith(prefixes) for name in names)


async def test_a_model_s_way_is_visible(world: World) -> None:
    """Files, instance, bytes, load and requests of a model, each where it belongs."""
    async with world.host(budget=1000) as running:
        sources = sources_of(running.host)
        await running.add("a")
        assert value(shown(sources), "modelhost_model_state", model="a", state="ABSENT") == 1
        await running.have("b")
        await running.load("b")
        await running.host.inference.infer("b", "", b"x", None)
        running.workers.infer_errors["b"] = ModelhostError(Reason.INTERNAL, "no")
        with pytest.raises(ModelhostError):
            await running.host.inference.infer("b", "", b"x", None)
        text = shown(sources)
    assert value(text, "modelhost_model_state", model="b", state="AVAILABLE") == 1
    assert value(text, "modelhost_model_state", model="b") == 1
    assert value(text, "modelhost_instance_state", model="b", state="READY", tier="DEVICE") == 1
    assert value(text, "modelhost_model_device_bytes", model="b", device="sim-0") == MODEL_BYTES
    assert value(text, "modelhost_device_used_bytes", device="sim-0") == MODEL_BYTES
    assert value(text, "modelhost_device_budget_bytes", device="sim-0") == 1000
    assert value(text, "modelhost_model_loads_total", model="b", result="ready") == 1
    assert value(text, "modelhost_model_load_seconds_count", model="b") == 1
    assert value(text, "modelhost_infer_requests_total", model="b", result="ok") == 1
    assert value(text, "modelhost_infer_requests_total", model="b", result="error") == 1
    assert value(text, "modelhost_infer_seconds_count", model="b", phase="total") == 1
    assert value(text, "modelhost_infer_in_flight", model="b") == 0
    assert value(text, "modelhost_queue_depth", model="b") == 0
    assert value(text, "modelhost_queue_depth", model="a") is None
    assert value(text, "modelhost_model_last_used_timestamp_seconds", model="b") is not None
    assert value(text, "modelhost_events_seq") == running.host.registry.journal.last_sequence


async def test_an_eviction_and_a_crash_are_counted(world: World) -> None:
    """A model that had to go and a worker that died can be told from a deliberate unload."""
    async with world.host(budget=MODEL_BYTES) as running:
        sources = sources_of(running.host, worker_pids=running.workers.pids)
        await running.have("a")
        await running.have("b")
        await running.load("a")
        await running.load("b")
        await running.host.registry.flush()
        text = shown(sources)
        assert value(text, "modelhost_model_evictions_total", model="a", reason="EVICTED") == 1
        assert value(text, "modelhost_workers", device="sim-0") == 1
        assert value(text, "modelhost_worker_crashes_total") is None
        running.workers.crash("sim-0", blamed="b", exit="signal SIGSEGV", replace=False)
        running.host.worker_counts.worker_exited(WorkerExit("sim-0", 1, "exit code 1", "x", ""))
        text = shown(sources)
    assert (
        value(text, "modelhost_worker_crashes_total", device="sim-0", model="b", kind="signal") == 1
    )
    assert value(text, "modelhost_worker_crashes_total", model="_unknown") == 1


async def test_downloads_are_counted_while_they_run(world: World) -> None:
    """Bytes rise before the end, and the end does not count them again."""
    async with world.host() as running:
        sources = sources_of(running.host)
        await running.have("a", size=300)
        text = shown(sources)
        assert value(text, "modelhost_download_bytes_total", model="a", source="hf") == 300
        assert value(text, "modelhost_downloads_in_progress") == 0
        await running.end(await running.host.transfers.download("a"))
        again = shown(sources)
    assert value(again, "modelhost_download_bytes_total", model="a") == 300


async def test_a_deleted_model_leaves_no_series(world: World) -> None:
    """The label is bounded by the registry: what is not in it has no series of its own."""
    async with world.host() as running:
        sources = sources_of(running.host)
        await running.have("a")
        await running.load("a")
        await running.host.inference.infer("a", "", b"x", None)
        await running.end(await running.host.residency.unload("a"))
        await running.end(await running.host.models.delete("a", force=True))
        labels = {
            label
            for series in samples(shown(sources)).values()
            for key in series
            for name, label in key
            if name == "model"
        }
    assert labels <= {"_unknown"}


async def test_requests_that_wait_are_a_queue(world: World) -> None:
    """What waits for a load stands in the queue, not in flight."""
    async with world.host() as running:
        sources = sources_of(running.host)
        await running.have("a")
        gate = running.workers.load_gate("a")
        gate.close()
        waiting = asyncio.ensure_future(running.host.inference.infer("a", "", b"x", None))
        await gate.reached()
        text = shown(sources)
        await world.clock.advance(3.0)
        gate.open()
        await waiting
        after = shown(sources)
    assert value(text, "modelhost_queue_depth", model="a") == 1
    assert value(text, "modelhost_infer_in_flight", model="a") == 0
    assert value(text, "modelhost_instance_state", model="a", state="LOADING") == 1
    assert value(after, "modelhost_infer_seconds_sum", model="a", phase="load") == 3.0
    assert value(after, "modelhost_infer_seconds_sum", model="a", phase="total") == 3.0


async def test_a_thousand_models_come_in_small_pieces(world: World) -> None:
    """No piece is larger than what a family may hold the loop for, however many models there are."""
    async with world.host() as running:
        for i in range(1000):
            await running.add(f"m{i}")
        pieces = list(families(sources_of(running.host)))
    assert max(map(len, pieces)) <= PIECE + 2000
    assert value("".join(pieces), "modelhost_model_state", state="ABSENT") == 1000


def test_codes_are_named_as_go_grpc_names_them() -> None:
    """A board that was made for go-grpc finds its codes."""
    assert (CODES[0], CODES[1], CODES[14]) == ("OK", "Canceled", "Unavailable")
    assert len(CODES) == 17
