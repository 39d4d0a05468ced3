"""The whole daemon is killed fifty times, in the middle of registry, download, load and event traffic."""

import os
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from tests.kill import programs

PARTS = 2
KILLS = 25
SEED = int(os.environ.get("MODELHOST_TEST_SEED", "1"))


@pytest.mark.timeout(2700)
def test_a_killed_daemon_comes_back_with_all_it_said(root: Path, hub: LoopbackHub) -> None:
    """Nothing that a client was told is lost, every stream goes on without a gap, workers are gone."""
    parts = [(root / f"{n}", hub.endpoint, KILLS, SEED * 1000 + n) for n in range(PARTS)]
    found = programs.run_parts("daemon_loop.py", parts, timeout_s=2400)
    for totals in found:
        print(totals)
        assert totals["kills"] == KILLS
        assert totals["acknowledged"] > KILLS
    assert sum(totals["workers_seen"] for totals in found) > 0
    assert sum(totals["answers"] for totals in found) > 0
