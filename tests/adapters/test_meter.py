"""The count of a download's bytes: it never goes back nor too far, and tells the rate of the line alone."""

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.adapters.progress import Meter
from modelhostd.core.resources import Phase, Retry

SIZES = {"a": 1000, "b": 0, "c": 70}
paths = st.sampled_from(sorted(SIZES))
steps = st.lists(
    st.tuples(
        st.sampled_from(["reuse", "advance", "finish", "retry", "goes on"]),
        paths,
        st.integers(0, 3000),
    ),
    max_size=60,
)


@given(steps)
def test_progress_only_grows(steps: list[tuple[str, str, int]]) -> None:
    """Whatever comes twice, begins again or is counted too high."""
    meter = Meter()
    meter.begin(SIZES)
    meter.enter(Phase.DOWNLOADING)
    before = meter.snapshot(0.0)
    for number, (what, path, count) in enumerate(steps):
        if what == "reuse":
            meter.reuse(path, count)
        elif what == "advance":
            meter.advance(path, count)
        elif what == "finish":
            meter.finish(path)
        else:
            meter.retrying(path, Retry(1, "X", "x", 0.0) if what == "retry" else None)
        now = meter.snapshot(1.0 + number)
        assert before.done_bytes <= now.done_bytes <= now.total_bytes == 1070
        assert before.done_files <= now.done_files <= now.total_files == 3
        assert before.reused_bytes <= now.reused_bytes <= now.done_bytes
        assert now.done_bytes == sum(file.done_bytes for file in meter.files())
        assert now.bytes_per_second >= 0
        before = now
    assert meter.left_bytes == before.total_bytes - before.done_bytes


def test_what_was_kept_is_no_speed() -> None:
    """Right after a resume the bytes are there and the rate is that of the new ones."""
    meter = Meter()
    meter.begin({"a": 1000})
    meter.reuse("a", 600)
    meter.enter(Phase.DOWNLOADING)
    first = meter.snapshot(10.0)
    assert (first.done_bytes, first.reused_bytes, first.bytes_per_second) == (600, 600, 0.0)
    meter.advance("a", 700)
    second = meter.snapshot(12.0)
    assert second.bytes_per_second == 50.0
    assert second.eta_s == 6.0


def test_it_waits_when_all_that_runs_waits() -> None:
    """One of two files that waits is no wait of the download; both are."""
    meter = Meter()
    meter.begin({"a": 10, "b": 10})
    meter.enter(Phase.DOWNLOADING)
    for path in "ab":
        meter.start(path)
    meter.retrying("a", Retry(1, "NETWORK_ERROR", "x", 5.0))
    assert meter.snapshot(0.0).phase is Phase.DOWNLOADING
    meter.retrying("b", Retry(3, "RATE_LIMITED", "y", 9.0))
    waiting = meter.snapshot(0.0)
    assert (waiting.phase, waiting.attempt) == (Phase.WAITING, 3)
    assert waiting.retry == Retry(3, "RATE_LIMITED", "y", 9.0)
    meter.retrying("a", None)
    meter.finish("b")
    going_on = meter.snapshot(0.0)
    assert (going_on.phase, going_on.retry) == (Phase.DOWNLOADING, None)
