"""20,000 damaged messages against the live daemon: no crash, no INTERNAL, nobody else harmed."""

import time
from collections.abc import Iterator

import pytest

from tests.hostile.bombard import bombard
from tests.hostile.damage import of_control
from tests.hostile.live import Live, live
from tests.hostile.profile import examples

UNARY, STREAMED, CONTROL = 8_000, 9_500, 2_500
assert UNARY + STREAMED + CONTROL >= 20_000


@pytest.fixture(scope="module")
def at() -> Iterator[Live]:
    """Start a daemon with two models in one worker."""
    with live(models=("m", "dear")) as running:
        yield running


@pytest.mark.timeout(0)
async def test_twenty_thousand_damaged_messages_hurt_nobody(at: Live) -> None:
    """Each is answered by the model it names or refused in type; worker, daemon and neighbour go on."""
    methods = list(of_control("m"))
    counts = {
        "ModelInfer": examples(UNARY),
        "ModelStreamInfer": examples(STREAMED),
        **dict.fromkeys(methods, -(-examples(CONTROL) // len(methods))),
    }
    assert sum(counts.values()) >= examples(20_000)
    seed = time.time_ns()
    print(f"seed {seed}")  # shown where it fails: the same seed does the same damage
    outcome = await bombard(at.daemon.admin, "m", "dear", counts, seed)
    print(outcome)
    assert outcome.judged == counts
    codes = outcome.codes
    assert codes.total() == sum(counts.values())
    assert not codes.keys() & {"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE"}, codes
    # Else the damage were such that nothing got past the door, or none of it were damage.
    assert codes["OK"] > counts["ModelInfer"] // 10
    assert codes["INVALID_ARGUMENT"] > counts["ModelInfer"] // 10
    assert outcome.bystander > 0
    at.check_alive()
    at.check_log()
    assert at.worker_pids() == at.workers
