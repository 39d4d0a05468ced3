"""JSON that was right and is not: some value of a document in another's place, or gone."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

HUGE = 10**30
_odd = st.sampled_from(
    [None, True, 0, -1, 1, 2**31, 2**63, HUGE, 0.5, 1e300, "", "x", "a\0b", "\u202e", "../x", "9" * 300,
     "\ud800", "x" * 5000, [], {}, [[]], [None], {"": None}, {"a": {"b": [1, {}]}}, ["../x"] * 70]
)  # fmt: skip
values = st.one_of(_odd, st.text(max_size=20), st.integers(), st.floats(allow_nan=False))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container and key of a document, in order."""
    pairs: list[tuple[Any, Any]] = []
    keys: Any = (
        value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    )
    for key in keys:
        pairs.append((value, key))
        pairs.extend(_places(value[key]))
    return pairs


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Change a JSON value in up to three places: another value, none, or one of its own."""
    made = {"": copy.deepcopy(document)}
    for _ in range(draw(st.integers(0, 3))):
        places = _places(made)
        inside, key = draw(st.sampled_from(places))
        match draw(st.integers(0, 4)):
            case 0 if inside is not made:
                del inside[key]
            case 1:
                other, there = draw(st.sampled_from(places))
                inside[key] = copy.deepcopy(other[there])
            case _:
                inside[key] = copy.deepcopy(draw(values))
    return made.get("")


def encoded(
    document: Any, damaged: Callable[[bytes], st.SearchStrategy[bytes]] = st.just
) -> st.SearchStrategy[bytes]:
    """Return bytes of the document, changed as JSON and then as bytes by ``damaged``."""
    return changed(document).map(lambda value: json.dumps(value).encode()).flatmap(damaged)
