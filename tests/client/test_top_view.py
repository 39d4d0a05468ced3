"""The picture of top on terminals of any size: what it keeps, what it leaves out, and in which order."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from modelhost.cli.top_view import FLEXIBLE, GAP, LEFT_OUT, MODEL, RANK, fitting, picture
from modelhost.v1 import host_pb2

LONG = "sentence-transformers-all-minilm-l6-v2-with-a-name-that-is-long"
USED = {"seconds": 1_700_000_000}


def _instance(
    model: str, state: str, tier: str, device: str = "devices/sim-0", **activity: object
) -> dict[str, object]:
    return {
        "model": f"models/{model}", "device": device, "state": state, "tier": tier, "health": "HEALTHY",
        "predicted_bytes": 300_000, "host_bytes": 300_032, "activity": {"last_used_time": USED, **activity},
        "device_bytes": 300_032 if tier == "DEVICE" else 0,
    }  # fmt: skip


LOOK = host_pb2.Statistics(
    devices=[
        {
            "device": "devices/sim-0", "budget_bytes": 4 << 20, "resident_bytes": 2 << 20,
            "reserved_bytes": 1 << 20, "foreign_bytes": 3 << 30,
        },
        {"device": "devices/cpu", "budget_bytes": 1 << 20, "resident_bytes": 2 << 20},
    ],
    host_tier_budget_bytes=8 << 20,
    host_tier_bytes=1 << 20,
    instances=[
        *(_instance(f"w{i:02d}", "WARM", "HOST", eviction_rank=i) for i in range(1, 30)),
        _instance(LONG, "READY", "DEVICE", eviction_rank=1),
        _instance("next", "READY", "DEVICE", eviction_rank=2),
        _instance("dear", "READY", "DEVICE", evict_blockers=["IN_FLIGHT", "QUEUED", "PINNED", "LEASED"]),
        _instance("comes", "LOADING", "HOST", evict_blockers=["IN_TRANSITION"]),
        _instance("goes", "DRAINING", "DEVICE", in_flight=3, evict_blockers=["IN_TRANSITION"]),
        _instance("other", "READY", "DEVICE", "devices/cpu", eviction_rank=1),
        _instance("bad", "BLOCKED", "DISK"),
    ],
    operations=[
        {"operation": f"operations/{i}", "kind": "LOAD", "model": "models/comes", "state": "RUNNING"}
        for i in range(9)
    ],
)  # fmt: skip


def drawn(width: int, height: int) -> list[str]:
    """Return the lines of the picture on a terminal of this size."""
    console = Console(width=width, height=height, file=io.StringIO(), record=True)
    console.print(picture(LOOK, console))
    return console.export_text().splitlines()


@pytest.mark.parametrize("height", [16, 24, 50])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_no_line_is_broken_and_none_too_many(width: int, height: int) -> None:
    """Whatever its size, a terminal is neither too narrow nor too low for the picture; no word stands in for a column."""
    lines = drawn(width, height)
    assert len(lines) <= height
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    (heading,) = (line for line in lines if line.startswith(MODEL))
    assert "…" not in heading
    assert "OR WHY" in heading


@pytest.mark.parametrize(
    ("width", "there"),
    [
        (40, ["STATE"]),
        (80, ["STATE", "PREDICTED", "MEM", "FLIGHT", "USED"]),
        (120, ["STATE", "DEVICE", "TIER", "PREDICTED", "MEM", "HEALTH", "FLIGHT", "USED"]),
        (200, ["STATE", "DEVICE", "TIER", "PREDICTED", "HEALTH", "FLIGHT", "QUEUED", "REQUESTS"]),
    ],
)
def test_what_matters_most_stays(width: int, there: list[str]) -> None:
    """A narrow terminal keeps states, a usual one bytes predicted and real, requests and last uses, too."""
    lines = drawn(width, 50)
    heading = next(line for line in lines if line.startswith(MODEL))
    assert set(there) <= {*heading.split()}


def test_rows_stand_by_place_and_last_to_go_first() -> None:
    """Trouble is on top; then each device's by what keeps them and falling rank; then what is in host memory."""
    rows = [line.split()[0] for line in drawn(200, 60) if line.split()[1:2] in (["sim-0"], ["cpu"])]
    devices = ["bad", "other", "comes", "dear", "goes", "next", LONG]
    assert rows == [*devices, *(f"w{i:02d}" for i in range(29, 0, -1))]


def test_a_long_name_is_cut_in_its_middle() -> None:
    """Of a name that does not fit both ends are seen, of what keeps an instance what lasts longest."""
    text = "\n".join(drawn(80, 50))
    assert "sentence…is-long" in text
    assert "leased" in text
    assert "in_transition" not in text
    assert LONG in "\n".join(drawn(200, 50))


def test_bars_are_as_wide_as_the_terminal_allows() -> None:
    """Amounts come before cells; where neither has room there is a share."""
    wide, narrow = drawn(120, 50)[1], drawn(40, 50)[1]
    assert "2.0 MiB + 1.0 MiB reserved of 4.0 MiB, 3.0 GiB used by others" in wide
    assert "█" * 20 + "▒" * 10 + "·" * 10 in wide
    assert "75 % of 4.0 MiB" in narrow
    assert "200 % of 1.0 MiB" in drawn(40, 50)[2] or "2.0 MiB of 1.0 MiB" in drawn(40, 50)[2]


TITLES = (MODEL, *LEFT_OUT, RANK)


@given(st.tuples(*(st.integers(3, 70) for _ in TITLES)), st.integers(1, 300))
def test_columns_fit_or_only_the_last_two_are_left(widths: tuple[int, ...], width: int) -> None:
    """What is kept fits with its gaps, keeps its width but for what may be cut, and nothing goes that had room."""
    natural = dict(zip(TITLES, widths, strict=True))
    kept = fitting(natural, width)
    assert {MODEL, RANK} <= {*kept}
    taken = sum(kept.values()) + GAP * (len(kept) - 1)
    assert taken <= width or {*kept} == {MODEL, RANK}
    for title, cells in kept.items():
        assert min(natural[title], FLEXIBLE.get(title, natural[title])) <= cells <= natural[title]
    gone = [title for title in LEFT_OUT if title not in kept]
    assert gone == list(LEFT_OUT[: len(gone)])
