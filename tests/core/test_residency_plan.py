"""Properties of the plan: what it admits fits, what it evicts suffices and is idle, what it refuses cannot be."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.budgets import check_budget, check_hold, check_loaded, over_budget
from modelhostd.core.claims import Claims
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.eviction import Holding, Policy
from modelhostd.core.ledger import Ledger
from modelhostd.core.residency import (
    BUSY_GRACE_S,
    RETRY_S,
    DeviceView,
    Evict,
    Fits,
    Refuse,
    Wait,
    Want,
    plan,
)
from modelhostd.core.resources import InstanceState

NOW = 1000.0
GUARD = Policy(min_residency_s=10.0)
SIZES = st.integers(0, 60)


@st.composite
def _devices(draw: st.DrawFn) -> Mapping[str, DeviceView]:
    views = {}
    for number in range(draw(st.integers(1, 3))):
        capacity = draw(st.integers(0, 100))
        left = capacity
        holdings = []
        for place in range(draw(st.integers(0, 6))):
            size = draw(st.integers(0, left))
            left -= size
            holdings.append(
                Holding(
                    model=f"m{number}-{place}",
                    device=f"d{number}",
                    bytes=size,
                    state=draw(
                        st.sampled_from(
                            [InstanceState.READY, InstanceState.LOADING, InstanceState.DRAINING]
                        )
                    ),
                    in_flight=draw(st.integers(0, 1)),
                    queued=draw(st.integers(0, 1)),
                    pinned=draw(st.booleans()),
                    leased=draw(st.booleans()),
                    last_used=draw(st.floats(0, NOW)),
                    priority=draw(st.integers(-1, 1)),
                )
            )
        taken = draw(st.integers(0, 20))
        claimed = draw(st.just(0) | st.integers(0, 40))
        views[f"d{number}"] = DeviceView(
            f"d{number}", capacity, tuple(holdings), claimed, taken_bytes=taken
        )
    return views


def _coming(view: DeviceView) -> int:
    return sum(h.bytes for h in view.holdings if h.state is InstanceState.DRAINING)


def _not_held(view: DeviceView) -> int:
    return view.capacity_bytes - sum(h.bytes for h in view.holdings if h.held)


@given(_devices(), SIZES, st.booleans(), st.floats(0, 10))
def test_each_answer_keeps_its_promise(
    devices: Mapping[str, DeviceView], size: int, one: bool, waited: float
) -> None:
    """Fits fits; Evict is idle, enough and no more; Refuse is exactly what could not be had."""
    want = Want("new", size, device="d0" if one else "", since=NOW - waited)
    usable = [devices["d0"]] if one else list(devices.values())
    answer = plan(want, devices, NOW, Policy())
    match answer:
        case Fits(device):
            view = devices[device]
            really = view.capacity_bytes - sum(h.bytes for h in view.holdings)
            assert size <= really
            # Whoever was promised bytes still finds them, of those that are left or on their way out.
            promised = min(view.claimed_bytes, max(0, really + _coming(view)))
            assert really - size + _coming(view) >= promised or size == 0
        case Evict(device, victims):
            view = devices[device]
            chosen = [h for h in view.holdings if h.model in victims]
            assert chosen
            assert all(h.idle for h in chosen)
            assert all(size > d.fitting_bytes for d in usable if size <= d.capacity_bytes)
            missing = size - view.free_bytes - _coming(view)
            total = sum(h.bytes for h in chosen)
            assert total >= missing > 0
            assert all(total - h.bytes < missing for h in chosen)
        case Wait(device, drain):
            view = devices[device]
            assert _not_held(view) >= size
            assert not drain or waited >= BUSY_GRACE_S
            assert not {h.model for h in view.holdings if h.held} & set(drain)
        case Refuse(error):
            if error.reason is Reason.MODEL_TOO_LARGE:
                assert all(size > d.capacity_bytes + d.taken_bytes for d in usable)
            else:
                possible = [d for d in usable if size <= d.capacity_bytes + d.taken_bytes]
                assert possible
                assert all(_not_held(d) < size for d in possible)
                view = devices[error.metadata["device"]]
                pinned = sum(h.bytes for h in view.holdings if h.pinned)
                assert (error.retry_delay_s is None) == (size > view.budget_bytes - pinned)


@given(_devices(), SIZES)
def test_a_device_in_the_request_is_the_only_one_planned_for(
    devices: Mapping[str, DeviceView], size: int
) -> None:
    """A load that names a device is never placed on, and never evicts from, another."""
    answer = plan(Want("new", size, device="d0"), devices, NOW, Policy())
    assert isinstance(answer, Refuse) or answer.device == "d0"


def test_what_is_too_large_is_told_what_would_help() -> None:
    """A larger budget where the device has the bytes, else another device, else a smaller model; never a budget in vain."""
    devices = {
        "small": DeviceView("small", 80, total_bytes=100),
        "large": DeviceView("large", 50, total_bytes=200),
    }

    def refused(size: int, device: str = "") -> ModelhostError:
        answer = plan(Want("x", size, device), devices, NOW, Policy())
        assert isinstance(answer, Refuse)
        assert answer.error.reason is Reason.MODEL_TOO_LARGE
        assert answer.error.retry_delay_s is None
        return answer.error

    numbers = {"model": "x", "neededBytes": "150", "budgetBytes": "50", "deviceBytes": "200"}
    error = refused(150)
    assert error.metadata == numbers | {"device": "large"}
    assert "raise that budget" in error.message
    error = refused(150, "small")
    assert error.metadata["deviceBytes"] == "100"
    assert "use devices/large" in error.message
    assert "raise" not in error.message
    error = refused(201)
    assert "raise" not in error.message
    assert "use devices/" not in error.message
    assert "smaller model" in error.message


@given(_devices(), st.integers(0, 60))
def test_a_load_that_took_too_much_stays_only_where_a_budget_can_hold(
    devices: Mapping[str, DeviceView], size: int
) -> None:
    """Refused exactly where it is held itself, took more than predicted, and what is held is more than there is: else others
    go, or it does, or it took no more than it was to have.
    """
    view = devices["d0"]
    for pinned in (True, False):
        own = Holding("new", "d0", size, InstanceState.LOADING, pinned=pinned)
        after = replace(view, holdings=(*view.holdings, own))
        held = [h for h in after.holdings if h.held and h.state is not InstanceState.DRAINING]
        if pinned and size > 1 and sum(h.bytes for h in held) > view.capacity_bytes:
            with pytest.raises(ModelhostError) as caught:
                check_loaded(after, "new", 1)
            assert caught.value.metadata["predictedBytes"] == "1"
        else:
            check_loaded(after, "new", 1)


def test_who_waits_in_vain_is_not_told_to_wait() -> None:
    """Leases end, and other processes do: repeat later. Pins have no end: no word of when to repeat."""

    def delay(**holding: bool) -> float | None:
        view = DeviceView("d", 30, (Holding("h", "d", 20, InstanceState.READY, **holding),))
        answer = plan(Want("x", 20), {"d": view}, NOW, Policy())
        assert isinstance(answer, Refuse)
        assert ("later" in answer.error.message) == (answer.error.retry_delay_s is not None)
        return answer.error.retry_delay_s

    assert delay(leased=True) == RETRY_S
    assert delay(pinned=True) is None
    assert delay(pinned=True, leased=True) is None
    taken = DeviceView("d", 10, taken_bytes=20)
    answer = plan(Want("x", 20), {"d": taken}, NOW, Policy())
    assert isinstance(answer, Refuse)
    assert answer.error.retry_delay_s == RETRY_S


def test_the_least_recently_used_goes_first() -> None:
    """Of equal instances the one used longest ago is the victim; priority outranks recency."""
    holdings = (
        Holding("old", "d", 10, InstanceState.READY, last_used=1.0),
        Holding("older-but-dear", "d", 10, InstanceState.READY, last_used=0.0, priority=1),
        Holding("new", "d", 10, InstanceState.READY, last_used=2.0),
    )
    view = DeviceView("d", 30, holdings)
    assert plan(Want("x", 10), {"d": view}, NOW, Policy()) == Evict("d", ("old",))
    assert [h.model for h in Policy().order(holdings, NOW)] == ["old", "new", "older-but-dear"]


def test_no_victim_is_spent_in_vain() -> None:
    """A victim that a larger one made superfluous stays: room for 4 of {1, 4} costs only the 4."""
    holdings = (
        Holding("small", "d", 1, InstanceState.READY, last_used=0.0),
        Holding("large", "d", 4, InstanceState.READY, last_used=1.0),
    )
    assert plan(Want("x", 4), {"d": DeviceView("d", 5, holdings)}, NOW, Policy()) == Evict(
        "d", ("large",)
    )


def test_memory_on_its_way_out_is_waited_for() -> None:
    """While enough memory is being freed nothing more is evicted."""
    holdings = (
        Holding("leaving", "d", 5, InstanceState.DRAINING),
        Holding("idle", "d", 5, InstanceState.READY),
    )
    assert plan(Want("x", 5), {"d": DeviceView("d", 10, holdings)}, NOW, Policy()) == Wait("d")


@given(_devices(), SIZES, SIZES)
def test_what_a_waiting_load_can_do_without_is_for_others(
    devices: Mapping[str, DeviceView], first: int, second: int
) -> None:
    """A load that is admitted beside one that waits takes nothing of what that will have when those behind it go."""
    view = devices["d0"]
    answer = plan(Want("first", first), {"d0": view}, NOW, Policy())
    if not isinstance(answer, Wait) or not answer.behind:
        return
    going = [h for h in view.holdings if h.model in answer.behind]
    assert not any(h.held or h.state is InstanceState.DRAINING for h in going)
    assert set(answer.drain) <= set(answer.behind)
    claims = Claims({"d0": view.claimed_bytes + first}, set(answer.behind))
    after = plan(Want("second", second), {"d0": claims.over(view)}, NOW, Policy())
    left = view.free_bytes + _coming(view) + sum(h.bytes for h in going) - first
    assert left >= 0
    if second <= min(left, view.free_bytes):
        assert after == Fits("d0")
    if isinstance(after, Fits):
        assert second <= max(0, left)


def test_a_young_instance_is_spared() -> None:
    """min_residency guards what became READY just now; when it has passed, it may go."""
    holding = Holding("young", "d", 5, InstanceState.READY, ready_since=NOW - 1)
    view = {"d": DeviceView("d", 5, (holding,))}
    guarded = plan(Want("x", 5, since=NOW), view, NOW, GUARD)
    assert guarded == Wait("d", behind=("young",))
    assert plan(Want("x", 5, since=NOW), view, NOW + 10, GUARD) == Evict("d", ("young",))


@given(_devices(), st.integers(0, 100), st.booleans())
def test_a_shrunk_budget_takes_no_more_than_it_must(
    devices: Mapping[str, DeviceView], capacity: int, busy: bool
) -> None:
    """What goes may go, suffices where that is possible, and nobody goes whose bytes are not missed."""
    view = replace(devices["d0"], capacity_bytes=capacity)
    chosen = over_budget(view, NOW, Policy(), busy=busy)
    missing = -view.free_bytes - _coming(view)
    assert not any(h.held or h.state is not InstanceState.READY for h in chosen)
    assert busy or all(h.idle for h in chosen)
    if missing <= 0:
        assert not chosen
    may_go = [
        h
        for h in view.holdings
        if h.state is InstanceState.READY and not h.held and (busy or h.idle)
    ]
    freed = sum(h.bytes for h in chosen)
    assert freed >= min(missing, sum(h.bytes for h in may_go))
    if chosen and all(h.idle for h in chosen) and freed >= missing:
        assert all(freed - h.bytes < missing for h in chosen)


@given(_devices(), st.integers(0, 100))
def test_a_budget_is_refused_only_where_no_eviction_reaches_it(
    devices: Mapping[str, DeviceView], size: int
) -> None:
    """It is taken where it holds what is pinned and leased and does not leave anyhow; else the error has the least."""
    view = devices["d0"]
    stays = [h for h in view.holdings if h.held and h.state is not InstanceState.DRAINING]
    least = sum(h.bytes for h in stays)
    refused = _refusal(lambda: check_budget(view, "devices/d0", size))
    assert (refused is not None) == (size < least)
    if refused is not None:
        assert refused.reason is Reason.BUDGET_TOO_SMALL
        assert refused.metadata["neededBytes"] == str(least)
        assert refused.metadata["heldBy"] == ",".join(h.model for h in stays if h.bytes)
        assert _refusal(lambda: check_budget(view, "devices/d0", least)) is None


@given(_devices(), st.integers(0, 100), st.data())
def test_a_pin_never_makes_a_budget_that_cannot_be_reached(
    devices: Mapping[str, DeviceView], size: int, data: st.DataObject
) -> None:
    """Whoever may be pinned or leased leaves the budget reachable, where it was so before."""
    view = devices["d0"]
    model = data.draw(st.sampled_from([h.model for h in view.holdings] or ["absent"]))
    pinned = [replace(h, pinned=h.pinned or h.model == model) for h in view.holdings]
    before = _refusal(lambda: check_budget(view, "devices/d0", size))
    refused = _refusal(lambda: check_hold(view, size, model))
    after = _refusal(lambda: check_budget(replace(view, holdings=pinned), "devices/d0", size))
    if refused is None:
        assert before is not None or after is None
    else:
        assert refused.reason is Reason.OUT_OF_DEVICE_MEMORY
        assert after is not None


def _refusal(check: Callable[[], None]) -> ModelhostError | None:
    try:
        check()
    except ModelhostError as error:
        return error
    return None


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["d0", "d1"]), st.integers(0, 50)),
        max_size=30,
    )
)
def test_the_ledger_is_the_sum_of_its_entries(steps: list[tuple[str, str, int]]) -> None:
    """Whatever is reserved, trued up and released, used(device) is the sum of what is held."""
    ledger = Ledger()
    model: dict[tuple[str, str], int] = {}
    for name, device, size in steps:
        key = (device, name)
        if key not in model:
            ledger.reserve(device, name, size)
            model[key] = size
        elif size % 2:
            assert ledger.true_up(device, name, size) == size - model[key]
            model[key] = size
        else:
            assert ledger.release(device, name) == model.pop(key)
        for each in ("d0", "d1"):
            assert ledger.used(each) == sum(v for (d, _), v in model.items() if d == each)
