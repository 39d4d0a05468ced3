"""What is there when the power comes back: by the letter of POSIX, and on a disk whose power is cut."""

import os
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from tests.kill import programs

ROUNDS = 25
CUTS = 40
SEED = int(os.environ.get("MODELHOST_TEST_SEED", "1"))


def test_what_is_told_to_be_there_was_synced_before(root: Path, hub: LoopbackHub) -> None:
    """When a row says that files are there, their names and bytes were synced, up to the home."""
    totals = programs.run("durable.py", root / "home", hub.endpoint, ROUNDS, SEED, timeout_s=250)
    assert totals["succeeded"] > ROUNDS // 2
    assert totals["checked"] > totals["succeeded"]


@pytest.mark.timeout(1200)
def test_a_power_cut_loses_nothing_that_was_told(disk: Path, hub: LoopbackHub) -> None:
    """After each cut nothing acknowledged is lost, nothing half is visible, no stream has a gap."""
    totals = programs.run("power_cut.py", disk, hub.endpoint, CUTS, SEED, timeout_s=1000)
    print(totals)
    assert totals["kills"] == CUTS
    assert totals["acknowledged"] > CUTS
    assert totals["artifacts_seen"] > 0
