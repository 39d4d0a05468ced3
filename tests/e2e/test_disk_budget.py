"""A budget for the disk through a whole daemon: waited for, raised, kept by a policy, over restarts."""

from collections.abc import Callable, Iterator

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhost import Client
from modelhost.v1 import models_pb2, operations_pb2
from tests.adapters.downloads_support import tiny
from tests.e2e.process import Daemon
from tests.support import wait_until

SIZE = 1_000_000
BUDGET = 1_600_000


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with three repositories of a megabyte each."""
    with LoopbackHub({f"org/{name}": Repo(tiny(SIZE, seed=ord(name))) for name in "abc"}) as hub:
        yield hub


def test_a_download_waits_for_room_and_a_policy_makes_it(
    make_daemon: Callable[..., Daemon], hub: LoopbackHub
) -> None:
    """It waits with the numbers, over a kill, too; once a policy is set, the other model goes for it."""
    daemon = make_daemon("--set", f"settings.disk_budget_bytes={BUDGET}", HF_ENDPOINT=hub.endpoint)
    with daemon, Client(daemon.target) as client:
        client.pull("hf://org/a")
        waiting = client.pull("hf://org/b", wait=False)

        def paused() -> bool:
            (found,) = (o for o in client.operations() if o.name == waiting.name)
            return found.state == operations_pb2.Operation.PAUSED

        wait_until(paused)
        used = client.storage()
        assert (used.budget_bytes, used.miss_count) == (BUDGET, 1)
        assert 0 < used.available_bytes <= BUDGET - SIZE
        error = client.get("b").artifacts[0].error
        assert error.reason == "INSUFFICIENT_DISK_SPACE"
        assert int(error.metadata["neededBytes"]) > SIZE
        daemon.kill()
    with daemon, Client(daemon.target) as client, Client(daemon.admin) as operator:
        assert client.get("b").state == models_pb2.Artifact.PAUSED
        operator.update_settings({"storage_policy": "lru"})
        wait_until(lambda: client.get("b").state == models_pb2.Artifact.AVAILABLE)
        assert client.get("a").state == models_pb2.Artifact.ABSENT
        assert [m.model for m in client.storage().models] == ["models/b"]
        client.pull("hf://org/c", timeout=200)
        assert client.get("b").state == models_pb2.Artifact.ABSENT
        verified = client.verify("c").operation.verify_result
        assert list(verified.findings) == []
        assert client.get("c").artifacts[0].HasField("verify_time")
        found = operator.check_storage(deep=True).operation.check_storage_result
        assert list(found.findings) == []
