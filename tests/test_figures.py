"""The tooling of the figures: it measures, judges and writes, and keeps what is written by hand."""

from pathlib import Path

import pytest

from bench import figures
from bench.figure import Figure
from bench.peers import install, servers


def test_a_part_is_measured_and_what_stands_by_hand_is_kept(tmp_path: Path) -> None:
    """A run of a part writes a table with a verdict, and leaves alone other parts and what follows the marker."""
    output = tmp_path / "RESULTS.md"
    output.write_text(
        "# Figures\n\n## start\n\nof last time\n\n## faults\n\nof that time\n\n"
        f"{figures.BY_HAND}\n\nwhat we think of it\n"
    )
    assert figures.main(["--quick", "--part", "start", "--output", str(output)]) == 0
    text = output.read_text()
    assert "of last time" not in text
    assert text.index("## start") < text.index("## faults\n\nof that time")
    assert "start to READY, empty | at most 0.4 s" in text
    assert "Measured apart from the others: " in text
    assert text.endswith(f"{figures.BY_HAND}\n\nwhat we think of it\n")


def test_a_whole_run_keeps_only_what_is_measured_apart(tmp_path: Path) -> None:
    """What a whole run does not measure, and nothing else, stays from before."""
    output = tmp_path / "RESULTS.md"
    figures.write(output, "# Figures", {"start": "a", "downloads": "b"}, apart=False)
    figures.write(output, "# Figures anew", {"faults": "c"}, apart=False)
    assert output.read_text() == (
        f"# Figures anew\n\n## faults\n\nc\n\n## downloads\n\nb\n\n{figures.BY_HAND}\n"
    )


def test_a_figure_is_held_against_its_goal() -> None:
    """A goal is of the number itself or of its share of the reference, from above or from below."""
    assert Figure("a", 2.0, "s", 1.0).met is False
    assert Figure("a", 2.0, "s", 0.5, at_least=True).met is True
    assert Figure("a", 2.0, "s", 0.5, reference=8.0, of_reference=True).met is True
    assert Figure("a", 2.0, "s", 0.5, True, reference=8.0, of_reference=True).met is False
    assert Figure("a", 2.0, "s").met is None


def test_a_peer_that_is_not_installed_is_absent_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers of others yield nobody where they are not installed, and a figure says so in its reference's place."""
    monkeypatch.setattr(install, "PEERS", tmp_path)
    with servers.triton({}, tmp_path) as triton, servers.mlserver({}, tmp_path) as mlserver:
        assert (triton, mlserver) == (None, None)
    figure = Figure("a", 2.0, "s", 1.0, of_reference=True, absent=servers.ABSENT)
    assert figure.met is None
    assert servers.ABSENT in figure.row()
