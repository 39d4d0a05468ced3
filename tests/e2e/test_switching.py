"""The tiers with everything real: two models on a device that holds one, and host memory between them."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from bench.loopback_hub import LoopbackHub, Repo
from bench.models import minilm_dir
from modelhost import Client
from modelhost.v1 import instances_pb2
from tests.e2e.process import Daemon

SOURCE = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["a cat sits on the mat", "the", "where is it"]
Instance = instances_pb2.Instance
FLAGS = (
    *("--set", "devices.sim_bytes=1GB"),
    *("--set", "budgets=sim-0=120MB"),
    *("--set", "settings.host_budget_bytes=400MB"),
)


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Iterator[Daemon]:
    """A daemon with a simulated GPU that has room for one of its two models."""
    repo = Repo.from_folder(minilm_dir(), pipeline_tag="sentence-similarity")
    with LoopbackHub({SOURCE: repo}) as hub, make_daemon(*FLAGS, HF_ENDPOINT=hub.endpoint) as made:
        yield made


def balanced(host: Client) -> dict[str, Instance]:
    """Return the instances by id, having held the ledger against what the workers said of them."""
    found = {i.model.removeprefix("models/"): i for i in host.instances()}
    figures = host.statistics()
    (device,) = (d for d in figures.devices if d.device == "devices/sim-0")
    on_device = [i for i in found.values() if i.tier == Instance.DEVICE]
    assert device.resident_bytes == sum(i.measured_bytes for i in on_device)
    assert device.reserved_bytes == 0
    assert device.resident_bytes + device.free_bytes == device.budget_bytes
    assert figures.host_tier_bytes == sum(i.host_bytes for i in found.values())
    assert figures.host_tier_bytes <= figures.host_tier_budget_bytes
    return found


@pytest.mark.timeout(540)
def test_models_switch_by_way_of_host_memory(daemon: Daemon) -> None:
    """Each of two models gives way to the other and comes back from its copy, with the same bits; unloads free all."""
    with Client(daemon.admin) as host:
        for model in ("one", "two"):
            host.pull(f"hf://{SOURCE}", name=model)
            # The first load imports a library.
            host.update(model, {"config.device": "devices/sim-0", "config.load_timeout": 280.0})
        first = {model: host.embed(model, TEXTS) for model in ("one", "two")}
        assert first["one"].tobytes() == first["two"].tobytes()
        found = balanced(host)
        assert (found["one"].state, found["two"].state) == (Instance.WARM, Instance.READY)
        assert abs(found["two"].measured_bytes / found["two"].predicted_bytes - 1) < 0.03
        names = {model: instance.name for model, instance in found.items()}
        for turn in range(4):
            model = ("one", "two")[turn % 2]
            planned = host.plan(model)
            assert planned.placement.source_tier == Instance.HOST
            assert [v.tier_after for v in planned.placement.victims] == [Instance.HOST]
            loaded = host.load(model).operation
            assert loaded.load_result.source_tier == Instance.HOST
            assert np.array_equal(host.embed(model, TEXTS), first[model])
            found = balanced(host)
            assert found[model].name == names[model]
            assert found[model].tier == Instance.DEVICE
        freed = host.unload("two", keep_warm=True).operation.unload_result
        assert freed.warm
        assert freed.freed_bytes == found["two"].measured_bytes
        for model in ("one", "two"):
            host.unload(model)
        assert not balanced(host)
        assert host.host_tier().used_bytes == 0
