"""A thousand kills on the way of a commit and of a download, at failpoints and at any moment."""

import os
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from tests.kill import programs

PARTS = 4
KILLS = 250
SEED = int(os.environ.get("MODELHOST_TEST_SEED", "1"))


@pytest.mark.timeout(2700)
def test_kills_lose_nothing_and_leave_nothing_half(root: Path, hub: LoopbackHub) -> None:
    """After each kill nothing acknowledged is lost, nothing half is visible, no stream has a gap."""
    parts = [(root / f"home{n}", hub.endpoint, KILLS, SEED * 1000 + n) for n in range(PARTS)]
    for totals in programs.run_parts("kill_loop.py", parts, timeout_s=2400):
        print(totals)
        assert totals["kills"] == KILLS
        assert totals["acknowledged"] > KILLS
        assert totals["told"] > KILLS
        assert totals["refused"] > 0, "the file with the flipped bit was never asked for"
        assert totals["at_failpoints"] > KILLS // 10
