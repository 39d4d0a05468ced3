"""A model whose source moved on, through a whole daemon: seen as outdated, and fetched when asked for."""

from collections.abc import Callable

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhost import Client, ModelhostError
from modelhost._freshness import Freshness
from tests.adapters.downloads_support import safetensors
from tests.e2e.process import Daemon


def test_a_newer_revision_is_fetched_beside_the_old_when_asked_for(
    make_daemon: Callable[..., Daemon],
) -> None:
    """A plain pull leaves alone what is there; with refresh the new revision comes, and is current."""
    old = {"config.json": b"{}", "model.safetensors": safetensors(1000)}
    repo = Repo(old)
    with (
        LoopbackHub({"org/m": repo}) as hub,
        make_daemon("--set", "worker.backends=identity", HF_ENDPOINT=hub.endpoint) as daemon,
        Client(daemon.target) as client,
    ):
        client.pull("hf://org/m")
        first = repo.head
        repo.commit({**old, "config.json": b'{"new": 1}'})
        assert [one.freshness for one in client.outdated(["m"])] == [Freshness.OUTDATED]
        client.pull("m")
        assert [one.revision for one in client.get("m").artifacts] == [first]

        sent = hub.sent_bytes()
        client.pull("m", refresh=True)
        kept = client.get("m").artifacts
        assert [one.revision for one in kept] == [first, repo.head]
        assert hub.sent_bytes() == sent, "the weights are the same: they came again"
        assert [one.freshness for one in client.outdated(["m"])] == [Freshness.CURRENT]

        client.pull("m", refresh=True)
        assert [one.version for one in client.get("m").artifacts] == [1, 2]


def test_what_came_with_allow_unsafe_is_compared_too(make_daemon: Callable[..., Daemon]) -> None:
    """A source of pickles only is refused when it is looked at, unless that is asked for."""
    repo = Repo({"config.json": b"{}", "pytorch_model.bin": b"\x80\x02}q\x00."})
    with (
        LoopbackHub({"org/p": repo}) as hub,
        make_daemon("--set", "worker.backends=identity", HF_ENDPOINT=hub.endpoint) as daemon,
        Client(daemon.admin) as client,
    ):
        with pytest.raises(ModelhostError, match="allow_unsafe"):
            client.inspect("hf://org/p")
        seen = client.inspect("hf://org/p", allow_unsafe=True)
        assert "pytorch_model.bin" in {file.path for file in seen.files}
        client.pull("hf://org/p", allow_unsafe=True)
        assert [one.freshness for one in client.outdated(["p"])] == [Freshness.CURRENT]
