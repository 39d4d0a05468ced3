"""Counting workers beside the one who acts on them."""

import pytest

from modelhostd.host.worker_counts import WorkerCounts, kind_of
from modelhostd.ports import WorkerExit
from tests.host.support import World


class Listener:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def worker_ready(self, device: str, pid: int) -> None:
        self.told.append((device, pid))

    def worker_exited(self, exit: WorkerExit) -> None:
        self.told.append(exit)


def test_everything_is_passed_on_and_counted() -> None:
    """Starts are counted by device, crashes by device, model and kind of end."""
    listener = Listener()
    counts = WorkerCounts(listener)
    lost = WorkerExit("cuda-0", 7, "signal SIGSEGV", "minilm", "")
    counts.worker_ready("cuda-0", 7)
    counts.worker_exited(lost)
    counts.worker_ready("cuda-0", 8)
    assert listener.told == [("cuda-0", 7), lost, ("cuda-0", 8)]
    assert counts.starts == {"cuda-0": 2}
    assert counts.crashes == {("cuda-0", "minilm", "signal"): 1}


@pytest.mark.parametrize(
    ("exit", "kind"),
    [
        ("exit code 70", "exit code"),
        ("signal SIGKILL", "signal"),
        ("hung: no heartbeat for 10 s", "hung"),
        ("still running 5 s after SIGTERM", "other"),
    ],
)
def test_an_end_is_one_of_four_kinds(exit: str, kind: str) -> None:
    """The text of an exit has numbers in it; a label must not."""
    assert kind_of(exit) == kind


async def test_a_host_counts_the_workers_it_loses(tmp_path) -> None:
    """The residency acts on the loss as before, and the host can tell how often it happened."""
    async with World(tmp_path).host() as running:
        await running.have("a")
        await running.load("a")
        running.workers.crash("sim-0", blamed="a", replace=False)
        assert running.host.worker_counts.crashes == {("sim-0", "a", "signal"): 1}
        await running.host.registry.flush()
        assert "CRASHED" in running.reasons("instances")
