"""Tables on narrow terminals: no line is broken that need not be, and what is left out is said."""

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhost.cli import views, views_memory
from modelhost.cli.output import GAP, Column, Output, fitting
from modelhost.v1 import instances_pb2, models_pb2

Instance = instances_pb2.Instance
LONG = "meta-llama-3.1-70b-instruct-gptq-int4"


class Terminal(io.StringIO):
    """What stdout is on a terminal."""

    def isatty(self) -> bool:
        """Say that it is one."""
        return True


def printed(monkeypatch: pytest.MonkeyPatch, rows: list[Any], columns: list[Column[Any]]) -> str:
    """Return a table as a terminal of 80 columns gets it."""
    made = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", made)
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "dumb")
        Output("auto").rows(rows, columns)
    return made.getvalue()


def instances(*models: str) -> list[Instance]:
    """Return instances in several states, busy and idle."""
    made = []
    for number, model in enumerate(models):
        one = Instance(model=f"models/{model}", device="devices/cuda-0", host_bytes=37 << 30)
        one.state = (Instance.READY, Instance.WARM, Instance.LOADING)[number % 3]
        one.predicted_bytes = one.measured_bytes = 37 << 30
        one.activity.in_flight = number
        one.activity.evict_blockers.append(1)
        made.append(one)
    return made


def test_ps_on_80_columns_breaks_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole names and numbers of what matters most; what has no room is named, unless it would tell nothing."""
    rows = instances(LONG, "b", "c")
    lines = printed(monkeypatch, rows, views_memory.INSTANCE_COLUMNS).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["MODEL", "DEVICE", "STATE", "MEMORY", "IN", "FLIGHT"]
    assert lines[1].split()[:3] == [LONG, "cuda-0", "ready"]
    note = capsys.readouterr().err
    assert "a wider terminal also shows" in note
    assert "KEPT BY" in note
    assert "QUEUED" not in note


def test_ls_on_80_columns_breaks_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long name and a long source are not both there."""
    model = models_pb2.Model(name=f"models/{LONG}", task="text-generation")
    model.source.uri = "hf://hugging-quants/Meta-Llama-3.1-70B-Instruct-GPTQ-INT4"
    lines = printed(monkeypatch, [model], views.model_columns({})).splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80


def test_a_name_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wider than the terminal for itself is wrapped by that."""
    name = "x" * 90
    assert name in printed(monkeypatch, instances(name), views_memory.INSTANCE_COLUMNS)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4), st.booleans()), min_size=1),
    st.integers(0, 200),
)
def test_what_fits_is_there_and_what_is_needed_always(
    given_columns: list[tuple[int, int, bool]], room: int
) -> None:
    """In the order of the columns; nothing is left out that has room."""
    columns = [Column("X", str, extra=extra) for _, extra, _ in given_columns]
    widths = [width for width, _, _ in given_columns]
    chosen = fitting(columns, widths, [told for _, _, told in given_columns], room)
    needed = [n for n, column in enumerate(columns) if not column.extra]
    assert chosen == sorted(chosen)
    assert {*needed} <= {*chosen}
    used = sum(widths[n] + GAP for n in chosen) - GAP
    assert used <= room or chosen == needed
    assert all(used + GAP + widths[n] > room for n in range(len(columns)) if n not in chosen)
