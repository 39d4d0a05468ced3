"""Three hundred kills in the middle of a file of megabytes: whole or absent, and gone on from to the byte."""

import os
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from tests.kill import programs

PARTS = 2
KILLS = 150
SEED = int(os.environ.get("MODELHOST_TEST_SEED", "1"))


@pytest.mark.timeout(2700)
def test_kills_in_mid_file_cost_no_byte_and_leave_no_half(root: Path, hub: LoopbackHub) -> None:
    """After each kill the model is there as a whole or not at all, no trusted byte is wrong, and the next
    download takes exactly what is there; in the end no file is left over.
    """
    parts = [(root / f"home{n}", hub.endpoint, KILLS, SEED * 1000 + n) for n in range(PARTS)]
    found = programs.run_parts("download_loop.py", parts, timeout_s=2400)
    for totals in found:
        print(totals)
        assert totals["kills"] == KILLS
    assert sum(totals["at_failpoints"] for totals in found) > PARTS * KILLS // 10
    assert sum(totals["in_mid_file"] for totals in found) > 0
    assert sum(totals["resumed"] for totals in found) > 0
    assert sum(totals["whole"] for totals in found) > 0
