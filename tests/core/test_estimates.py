"""What a model is taken to need after it found too little memory."""

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.estimates import (
    HALVED_AFTER_S,
    Room,
    corrected_bytes,
    eased,
    for_requests,
    missing_bytes,
)

SIZES = st.integers(0, 1 << 45)


def test_it_goes_by_model_and_device() -> None:
    """A quarter of the model, a hundredth of the device, or what the failed allocation asked for: the largest."""
    room = Room(capacity=1_000, free=0, most=1_000)
    assert corrected_bytes(400, 0, room) == 500
    assert corrected_bytes(4, 0, room) == 14
    assert corrected_bytes(400, 300, room) == 700


def test_what_a_worker_says_is_taken_with_care() -> None:
    """A number of bytes is one of digits; whatever else an error carries counts as not said."""
    assert missing_bytes({"neededBytes": "4096"}) == 4096
    for said in ("", "-1", "1e9", "1" * 30, "\u0663", "abc"):
        assert missing_bytes({"neededBytes": said}) == 0
    assert missing_bytes({}) == 0


def test_it_is_more_than_what_was_free() -> None:
    """What was free was not enough: the next try has more, so that somebody goes for it."""
    assert corrected_bytes(400, 0, Room(capacity=1_000, free=200, most=1_000)) == 601


def test_a_small_model_on_a_small_device_asks_for_little() -> None:
    """On a device of 1 GiB a model of 8 MiB is not taken to need a quarter of the device."""
    assert corrected_bytes(8 << 20, 0, Room(1 << 30, 0, 1 << 30)) < 20 << 20


def test_one_absurd_request_does_not_get_the_device() -> None:
    """What requests are taken to need is a quarter of the device at most, and nothing where they ask for more than there is."""
    room = Room(capacity=1_000, free=100, most=1_000)
    assert for_requests(300, 300, 0, room) == 401
    assert for_requests(300, 300, 700, room) == 550
    assert for_requests(300, 550, 100, room) == 550
    assert for_requests(300, 300, 701, room) == 300


@given(SIZES, SIZES, st.builds(Room, SIZES, SIZES, SIZES))
def test_it_never_asks_for_less_nor_for_what_cannot_be_had(
    size: int, missing: int, room: Room
) -> None:
    """It is more than before unless there is no more to be had, and then it is what it was."""
    corrected = corrected_bytes(size, missing, room)
    assert size <= corrected <= max(size, room.most)
    assert corrected > size or room.most <= size


@given(SIZES, st.floats(0, 1e9), st.floats(0, 1e9))
def test_what_requests_lacked_goes_by_halves(extra: int, first: float, second: float) -> None:
    """It never grows, is whole for the first interval and half in the second, and in a few days nothing is left."""
    earlier, later = sorted((first, second))
    assert extra >= eased(extra, earlier) >= eased(extra, later) >= 0
    assert eased(extra, HALVED_AFTER_S - 1) == extra
    assert eased(extra, HALVED_AFTER_S + 1) == extra // 2
    assert eased(extra, 50 * HALVED_AFTER_S) == 0
