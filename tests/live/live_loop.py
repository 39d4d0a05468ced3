"""A program for the soak: random steps on a live daemon until the time is up.

``python live_loop.py PLACE HUB COUNT SEED SECONDS``; PLACE and HUB are the other programs'. Prints the totals.
"""

import json
import sys
import time

from tests.live.steps import DEVICES, run, world_on

RUNS = 4
"""Runs between two looks at the clock."""


def main(count: int, seed: int, seconds: float) -> None:
    """Go on with one device, chosen by the seed, until ``count`` steps or the seconds are over."""
    end = time.monotonic() + seconds
    number = 0
    with world_on(sorted(DEVICES)[seed % len(DEVICES)]) as world:
        while time.monotonic() < end and world.steps < count:
            run(world, RUNS, seed * 1000 + number)
            number += 1
        print(json.dumps({"steps": world.steps, "crashes": world.crashes}))


if __name__ == "__main__":
    main(int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
