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
    found = programs.run_parts("kill_loop.py", parts, timeout_s=2400)
    for totals in found:
        print(totals)
        assert totals["kills"] == KILLS
        assert totals["acknowledged"] > KILLS
        assert totals["told"] > KILLS
    # Of all together: one part alone has some seven of the first, and none now and then.
    refused = sum(totals["refused"] for totals in found)
    assert refused > 0, "the file with the flipped bit was never asked for"
    assert sum(totals["at_failpoints"] for totals in found) > PARTS * KILLS // 10
