"""How many examples a fuzzing test makes: a few in `make test`, a hundred times as many in the profile `soak`."""

from hypothesis import settings

_USUAL = 100


def examples(count: int) -> int:
    """Return ``count`` times what the profile asks for more than usual."""
    return max(1, count * settings().max_examples // _USUAL)
