"""Several models by one command, and one model of several URLs, through a whole daemon."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhost import Client
from tests.adapters.loopback_site import LoopbackSite, Page
from tests.e2e.process import Daemon

Make = Callable[..., Daemon]

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


def weights(name: str) -> bytes:
    """Return a safetensors file that no other model has."""
    return len(HEADER).to_bytes(8, "little") + HEADER + name.encode() * 4


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with two models."""
    repos = {f"org/{name}": Repo({"model.safetensors": weights(name)}) for name in "ab"}
    with LoopbackHub(repos) as running:
        yield running


def run(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "modelhost", "--target", daemon.target, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)


def test_a_batch_ends_with_a_result_for_each(make_daemon: Make, hub: LoopbackHub) -> None:
    """What is not there fails alone, and the command with it; what is there is there."""
    with make_daemon(HF_ENDPOINT=hub.endpoint) as daemon, Client(daemon.target) as client:
        done = run(daemon, "pull", "hf://org/a", "hf://org/missing", "hf://org/b")
        lines = [line.split("\t")[:3] for line in done.stdout.splitlines()]
        assert lines == [
            ["hf://org/a", "a", "well"],
            ["hf://org/missing", "missing", "failed"],
            ["hf://org/b", "b", "well"],
        ]
        assert done.returncode == 3
        assert "[SOURCE_NOT_FOUND]" in done.stderr
        assert {file.path for file in client.files("b")} == {"model.safetensors"}
        outcomes = client.pull_all(["a", "b"])
        assert [outcome.ok for outcome in outcomes] == [True, True]


def test_several_urls_make_one_model_that_a_restart_keeps(make_daemon: Make) -> None:
    """Under their names, shown with it, and the same source when it is asked for again."""
    with LoopbackSite() as site:
        site.pages["/p/model.safetensors"] = Page(weights("u"))
        site.pages["/q/config.json"] = Page(b"{}")
        urls = [f"{site.url}/p/model.safetensors", f"{site.url}/q/config.json"]
        daemon = make_daemon(
            *("--set", "downloads.http_hosts=127.0.0.1"),
            *("--set", "downloads.private_hosts=127.0.0.1"),
        )
        command = ("pull", "--url", urls[0], "--url", urls[1], "--name", "two")
        with daemon, Client(daemon.target) as client:
            done = run(daemon, *command)
            assert done.returncode == 0, done.stderr
            assert {file.path for file in client.files("two")} == {
                "model.safetensors",
                "config.json",
            }
        with daemon, Client(daemon.target) as client:
            assert list(client.get("two").source.more_uris) == urls[1:]
            assert run(daemon, *command).returncode == 0
            other = run(daemon, *command[:3], "--name", "two")
            assert other.returncode == 5
            assert "[ALREADY_EXISTS]" in other.stderr
            (compared,) = client.outdated(["two"])
            assert compared.freshness.name == "CURRENT"
