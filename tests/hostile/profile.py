"""What a fuzzing test makes: a few examples in `make test`, a hundred times as many in the profile `soak`."""

import time

from hypothesis import settings

_USUAL = 100
_SEED = 1


def examples(count: int) -> int:
    """Return ``count`` times what the profile asks for more than usual."""
    return max(1, count * settings().max_examples // _USUAL)


def new_seed() -> int:
    """Return a seed that no run had before; in CI always the same, so that a failure is the change's."""
    return _SEED if settings().derandomize else time.time_ns()
