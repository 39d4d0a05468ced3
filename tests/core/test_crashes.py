"""Crashes of a model: isolated at the second that others paid for, blocked at the fifth."""

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.crashes import (
    BLOCKED_AT,
    ISOLATED_AT,
    STDERR_MAX,
    WINDOW_S,
    Crashes,
    last_words,
)

HISTORIES = st.lists(st.tuples(st.floats(0.0, WINDOW_S), st.booleans()), max_size=20)


@given(HISTORIES)
def test_what_crashes_lead_to_is_what_a_count_of_the_window_says(
    history: list[tuple[float, bool]],
) -> None:
    """Isolated once two crashes of a shared worker, blocked once five of any, were ever within the window."""
    crashes, now = Crashes(), 0.0
    seen: list[tuple[float, bool]] = []
    isolated = blocked = False
    for gap, shared in history:
        now += gap
        seen.append((now, shared))
        window = [s for t, s in seen if now - t <= WINDOW_S]
        isolated = isolated or sum(window) >= ISOLATED_AT
        blocked = blocked or len(window) >= BLOCKED_AT
        crashes = crashes.crashed(now, shared=shared)
        assert crashes.blocked == blocked
        assert not crashes.isolated or isolated
        assert crashes.isolated == isolated or len(window) > BLOCKED_AT
        assert crashes.count(now) == min(len(window), BLOCKED_AT)
        assert len(crashes.recent) <= BLOCKED_AT


@given(HISTORIES)
def test_crashes_of_a_model_s_own_process_never_isolate_it(
    history: list[tuple[float, bool]],
) -> None:
    """What nobody else paid for is no reason to move; it counts towards a block alone."""
    crashes, now = Crashes(), 0.0
    for gap, _ in history:
        now += gap
        crashes = crashes.crashed(now, shared=False)
    assert not crashes.isolated


def test_what_is_forgiven_counts_on_towards_a_block() -> None:
    """After two shared crashes are forgiven, one more does not isolate; three more block."""
    crashes = Crashes().crashed(0.0, shared=True).crashed(1.0, shared=True)
    assert crashes.isolated
    crashes = crashes.shared_again()
    assert not crashes.isolated
    crashes = crashes.crashed(2.0, shared=True)
    assert not crashes.isolated
    crashes = crashes.crashed(3.0, shared=False).crashed(4.0, shared=False)
    assert crashes.blocked


def test_of_a_crash_the_thread_that_crashed_is_told() -> None:
    """Faulthandler's report names it first, and goes on with all others for pages; without a report the end is told."""
    report = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x7f:\n  the culprit\n"
    told = last_words("a log line\n" * 500 + report + "Thread 0x6f:\n  idle\n" * 500)
    assert told.startswith(report)
    assert len(told) == STDERR_MAX
    assert last_words("x" * 5000 + "the end") == "x" * (STDERR_MAX - 7) + "the end"
    assert last_words("") == ""
