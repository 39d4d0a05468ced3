"""Properties of the host tier: what is dropped suffices and may go, and nothing is dropped for what cannot be kept."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.eviction import COST_AWARE, LRU, Holding, Policy
from modelhostd.core.host_tier import (
    HOST,
    LEFT_FREE_BYTES,
    Room,
    default_budget_bytes,
    make_room,
    over_budget,
)
from modelhostd.core.residency import DeviceView
from modelhostd.core.resources import InstanceState

NOW = 1000.0
STATES = [
    InstanceState.WARM,
    InstanceState.READY,
    InstanceState.LOADING,
    InstanceState.DRAINING,
]


@st.composite
def views(draw: st.DrawFn) -> DeviceView:
    """Host memory that holds no more than its budget, whatever states its holders are in."""
    left = capacity = draw(st.integers(0, 100))
    holdings = []
    for place in range(draw(st.integers(0, 6))):
        size = draw(st.integers(0, left))
        left -= size
        state = draw(st.sampled_from(STATES))
        holdings.append(
            Holding(
                f"m{place}",
                HOST,
                size,
                state,
                queued=draw(st.integers(0, 1)),
                pinned=draw(st.booleans()),
                leased=draw(st.booleans()),
                last_used=draw(st.floats(0, NOW)),
                ready_since=NOW,
                load_s=draw(st.floats(0, 10)),
                bound=state is InstanceState.LOADING
                or (state is InstanceState.READY and draw(st.booleans())),
            )
        )
    return DeviceView(HOST, capacity, tuple(holdings), claimed_bytes=draw(st.integers(0, left)))


POLICIES = st.builds(Policy, st.sampled_from([LRU, COST_AWARE]), st.sampled_from([0.0, 10.0]))


def going(view: DeviceView) -> int:
    return sum(h.bytes for h in view.holdings if h.state is InstanceState.DRAINING)


@given(views(), st.integers(0, 120), POLICIES)
def test_room_is_enough_and_no_more(view: DeviceView, needed: int, policy: Policy) -> None:
    """What is kept fits after the victims went; only copies that nobody holds or waits for go, and none that need not."""
    room = make_room(view, needed, NOW, policy)
    may_go = [h for h in view.holdings if h.idle]
    if room is None:
        assert view.free_bytes + going(view) + sum(h.bytes for h in may_go) < needed or (
            needed > view.capacity_bytes
        )
        return
    chosen = [h for h in view.holdings if h.model in room.victims]
    assert all(h.idle and not h.bound for h in chosen)
    assert {h.state for h in chosen} <= {InstanceState.WARM, InstanceState.READY}
    freed = sum(h.bytes for h in chosen)
    assert view.free_bytes + going(view) + freed >= needed
    assert room.waits == (needed > view.fitting_bytes)
    for each in chosen:
        assert view.free_bytes + going(view) + freed - each.bytes < needed


@given(views(), st.integers(0, 100), POLICIES)
def test_a_shrunk_budget_drops_what_may_go(view: DeviceView, capacity: int, policy: Policy) -> None:
    """As many copies go as must, all that may where they do not suffice, and nothing else does."""
    shrunk = replace(view, capacity_bytes=capacity)
    chosen = over_budget(shrunk, NOW, policy)
    by_name = {h.model: h for h in shrunk.holdings}
    assert all(by_name[name].idle for name in chosen)
    missing = -shrunk.free_bytes - going(shrunk)
    freed = sum(by_name[name].bytes for name in chosen)
    if missing <= 0:
        assert not chosen
    else:
        assert freed >= min(missing, sum(h.bytes for h in shrunk.holdings if h.idle))


def test_the_least_recently_used_copy_goes_first() -> None:
    """Of equal copies the one used longest ago goes, be its model on a device or not; one that moves, is wanted or pinned stays."""
    warm = InstanceState.WARM
    held = (
        Holding("new", HOST, 10, warm, last_used=9.0),
        Holding("old", HOST, 10, warm, last_used=1.0),
        Holding("resident", HOST, 10, InstanceState.READY, last_used=2.0),
        Holding("wanted", HOST, 10, warm, queued=1),
        Holding("pinned", HOST, 10, warm, pinned=True),
        Holding("moving", HOST, 10, InstanceState.READY, bound=True),
    )
    view = DeviceView(HOST, 60, held)
    assert make_room(view, 10, NOW, Policy()) == Room(("old",), waits=True)
    assert make_room(view, 20, NOW, Policy()) == Room(("old", "resident"), waits=True)
    assert make_room(view, 30, NOW, Policy()) == Room(("old", "resident", "new"), waits=True)
    assert make_room(view, 31, NOW, Policy()) is None
    assert make_room(replace(view, capacity_bytes=70), 10, NOW, Policy()) == Room()


def test_what_is_dear_to_load_stays_under_cost_aware() -> None:
    """Under `cost-aware` the copy goes that disk brings back sooner."""
    uses = {"last_used": 900.0, "second_last_use": 800.0}
    held = (
        Holding("dear", HOST, 10, InstanceState.WARM, load_s=10.0, **uses),  # type: ignore[arg-type]
        Holding("cheap", HOST, 10, InstanceState.WARM, load_s=0.1, **uses),  # type: ignore[arg-type]
    )
    view = DeviceView(HOST, 20, held)
    assert make_room(view, 10, NOW, Policy(COST_AWARE)) == Room(("cheap",), waits=True)


def test_the_default_leaves_the_machine_alone() -> None:
    """Half of what there is at most, and never the last 4 GiB that are free."""
    gib = 1 << 30
    assert default_budget_bytes(64 * gib, 60 * gib) == 32 * gib
    assert default_budget_bytes(64 * gib, 20 * gib) == 16 * gib
    assert default_budget_bytes(8 * gib, LEFT_FREE_BYTES - 1) == 0
