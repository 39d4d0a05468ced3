"""A program for the soak: damaged messages against a live daemon until the time is up.

``python mutation_loop.py PLACE HUB COUNT SEED SECONDS``; PLACE and HUB are the other programs'. Prints the totals.
"""

import asyncio
import json
import sys
import time

from tests.hostile.bombard import bombard
from tests.hostile.damage import of_control
from tests.hostile.live import live

ROUND = {"ModelInfer": 3000, "ModelStreamInfer": 1000, **dict.fromkeys(of_control("m"), 50)}
"""Messages between two looks at the clock."""


def main(count: int, seed: int, seconds: float) -> None:
    """Go on until ``count`` messages were judged or the seconds are over."""
    end = time.monotonic() + seconds
    judged = rounds = 0
    with live(models=("m", "dear")) as at:
        while time.monotonic() < end and judged < count:
            number = seed * 1000 + rounds
            try:
                outcome = asyncio.run(bombard(at.daemon.admin, "m", "dear", ROUND, number))
            except Exception as error:
                raise AssertionError(f"seed {number} of the bombardment") from error
            assert outcome.judged == ROUND, outcome
            at.check_alive()
            at.check_log()
            assert at.worker_pids() == at.workers
            judged += outcome.judged.total()
            rounds += 1
    print(json.dumps({"messages": judged}))


if __name__ == "__main__":
    main(int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
