"""Crash after crash, a whole daemon holds what it held before."""

import pytest

from bench.faults import leaks

SLACK_BYTES = 12 * 2**20
"""What memory may grow by, however many crashes: the ring of the last events fills up, and the allocator keeps its peaks.
A leak of one worker's buffers (over 1 MiB here) would pass it within 40, one of 16 KiB a crash within 1,000."""


# Each in its own parameter: a timeout of the whole function is the nearer one, and 1,000 crashes had that of 40.
@pytest.mark.parametrize(
    "crashes",
    [
        pytest.param(40, marks=pytest.mark.timeout(1800)),
        pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(18000)]),
    ],
)
def test_crashes_leave_nothing_behind(crashes: int) -> None:
    """Descriptors, tasks and children are no more than before, not by one; memory is as much."""
    figures = leaks(crashes)
    before, after = dict(figures["before"]), dict(figures["after"])
    grown = after.pop("rss_bytes") - before.pop("rss_bytes")
    assert all(after[name] <= count for name, count in before.items()), figures
    assert grown <= SLACK_BYTES
