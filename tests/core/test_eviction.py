"""The order in which instances go: by recency, or by recency weighed with what coming back costs."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.eviction import COST_AWARE, LRU, Holding, Policy
from modelhostd.core.resources import InstanceState

NOW = 1000.0
MB = 1_000_000
COST = Policy(COST_AWARE)


def holding(model: str, size: int = MB, **given: float) -> Holding:
    return Holding(model, "d", size, InstanceState.READY, **given)  # type: ignore[arg-type]


@st.composite
def holdings(draw: st.DrawFn) -> list[Holding]:
    """Holdings with different names, whose times do not lie in the future."""
    times = st.floats(0, NOW)
    return [
        Holding(
            f"m{number}",
            "d",
            draw(st.integers(0, 80_000 * MB)),
            InstanceState.READY,
            last_used=draw(times),
            second_last_use=draw(st.just(-math.inf) | times),
            load_s=draw(st.floats(0, 600)),
            priority=draw(st.integers(-2, 2)),
        )
        for number in range(draw(st.integers(0, 8)))
    ]


def names(order: object) -> list[str]:
    return [h.model for h in order]  # type: ignore[attr-defined]


@given(holdings(), st.sampled_from([LRU, COST_AWARE]), st.randoms(use_true_random=False))
def test_the_order_is_one_order(found: list[Holding], policy: str, random: object) -> None:
    """Everyone is in it once, low priority first, whatever order they were given in."""
    order = Policy(policy).order(found, NOW)
    assert sorted(names(order)) == sorted(names(found))
    assert [h.priority for h in order] == sorted(h.priority for h in found)
    random.shuffle(found)  # type: ignore[attr-defined]
    assert Policy(policy).order(found, NOW) == order


def test_lru_minds_the_last_use_alone() -> None:
    """Neither bytes nor what a load takes change the order of `lru`."""
    found = [
        holding("new", last_used=3.0, load_s=0.1),
        holding("old", 100 * MB, last_used=1.0, load_s=100.0),
        holding("middle", last_used=2.0),
    ]
    assert names(Policy().order(found, NOW)) == ["old", "middle", "new"]


def test_what_comes_back_quickly_goes_first() -> None:
    """Of two of equal age and size `cost-aware` evicts the one that is loaded again sooner."""
    used: Any = {"last_used": 990.0, "second_last_use": 900.0}
    found = [holding("dear", load_s=10.0, **used), holding("cheap", load_s=1.0, **used)]
    assert names(COST.order(found, NOW)) == ["cheap", "dear"]


def test_one_large_model_goes_rather_than_one_small_one() -> None:
    """With the same age and the same cost, the bytes that are freed decide."""
    used: Any = {"last_used": 990.0, "second_last_use": 900.0, "load_s": 1.0}
    found = [holding("small", MB, **used), holding("large", 10 * MB, **used)]
    assert names(COST.order(found, NOW)) == ["large", "small"]


def test_a_single_use_does_not_protect() -> None:
    """What was used once, however lately, goes before what was used twice; then bytes a second."""
    found = [
        holding("steady", last_used=500.0, second_last_use=400.0, load_s=0.1),
        holding("once", last_used=999.0, load_s=100.0),
        holding("once-cheap", last_used=999.0, load_s=1.0),
    ]
    assert names(COST.order(found, NOW)) == ["once-cheap", "once", "steady"]


def test_a_load_that_took_no_time_is_weighed_all_the_same() -> None:
    """Neither an age nor a load of zero seconds breaks the order."""
    found = [
        holding("now", last_used=NOW, second_last_use=NOW, load_s=0.0),
        holding("before", last_used=NOW, second_last_use=NOW - 1, load_s=0.0),
    ]
    assert names(COST.order(found, NOW)) == ["before", "now"]


def test_the_guard_ends() -> None:
    """An instance is young for as long as the guard says, from when it became READY."""
    guard = Policy(min_residency_s=10.0)
    young = holding("a", ready_since=NOW - 9.9)
    assert guard.young(young, NOW)
    assert not guard.young(young, NOW + 0.1)
    assert not Policy().young(holding("a", ready_since=NOW), NOW)
