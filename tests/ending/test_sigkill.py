"""SIGKILL of the daemon: its workers go with it, whatever they are doing."""

import os

import pytest

from modelhost import Client
from tests.ending.scene import MODEL, Scene, scene
from tests.support import readable, wait_until

STARTS = 5


@pytest.fixture
def at():
    """A daemon with a loaded model."""
    with scene() as made:
        yield made.loaded()


def _gone(descriptors: list[int]) -> None:
    """Wait until the processes of these pidfds have ended."""
    for descriptor in descriptors:
        ended = readable(descriptor)
        os.close(descriptor)
        assert ended, "a worker outlives its daemon"


@pytest.mark.parametrize("name", ["idle", "stopped", "inferring"])
def test_workers_go_with_a_killed_daemon(at: Scene, name: str) -> None:
    """A worker ends when its daemon is killed: idle, stopped by a signal, or with a request in flight."""
    {"idle": at.workers, "stopped": at.worker_hung, "inferring": at.inferring}[name]()
    workers = [os.pidfd_open(pid) for pid in at.workers()]
    assert workers
    at.daemon.kill()
    _gone(workers)


def test_workers_that_begin_go_with_a_killed_daemon(at: Scene) -> None:
    """A worker whose daemon is killed while it starts, before it has said anything, ends as well."""
    at.daemon.kill()
    for _ in range(STARTS):
        at.daemon.start()
        with Client(at.daemon.admin) as client:
            client.load(MODEL, wait=False)
            children = wait_until(at.workers)
        begun = [os.pidfd_open(pid) for pid in children]
        at.daemon.kill()
        _gone(begun)
