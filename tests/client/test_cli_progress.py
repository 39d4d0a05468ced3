"""Progress on terminals and elsewhere, and what Ctrl-C leaves behind."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from modelhost import Client, _progress
from modelhost._text import plain, plain_json, read_bytes, show_bytes, show_seconds
from modelhost.v1 import operations_pb2
from tests.client.double import Double, hold
from tests.client.told import DONE, ID, NAME, RUNNING
from tests.support import DEADLINE_S

Operation = operations_pb2.Operation


def step(phase: str, done: int, total: int, **fields) -> Operation:
    operation = Operation(name=NAME, kind="LOAD", model="models/m\x1b", state="RUNNING", **fields)
    operation.progress.phase = operations_pb2.OperationProgress.Phase.Value(phase)
    operation.progress.done_bytes = done
    operation.progress.total_bytes = total
    return operation


# --- progress -----------------------------------------------------------------------------------------


def test_plain_lines_come_at_phases_and_tenths() -> None:
    """Away from a terminal a line comes for each phase and each tenth, not for each sample."""
    stream = io.StringIO()
    with _progress.shown(stream) as report:
        report(Operation(kind="LOAD", model="models/m", state="QUEUED", queue_position=2))
        report(step("EVICTING", 0, 0))
        for done in range(0, 1001, 5):
            report(step("LOADING", done, 1000))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "load m: queued (2)"
    assert lines[1] == "load m\\x1b: evicting"
    assert lines[2] == "load m\\x1b: loading 0 % 0 B of 1000 B"
    assert len(lines) == 2 + 11


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar() -> None:
    """On a terminal the bar has title, share, bytes, rate and what is being done; it is gone at the end."""
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    operation = step("DOWNLOADING", 512, 1024)
    operation.progress.bytes_per_second = 2048
    operation.progress.eta.seconds = 65
    operation.progress.retry.reason = "NETWORK_ERROR"
    operation.progress.retry.attempt = 2
    with _progress.shown(stream, console) as report:
        report(operation)
        console.file.flush()
    text = stream.getvalue()
    for part in (
        "load m\\x1b",
        "50 %",
        "512 B of 1.0 KiB, 2.0 KiB/s, 1 min 5 s left, again after NETWORK_ERROR (2)",
        "downloading",
    ):
        assert part in text


def test_an_unknown_phase_or_kind_is_shown_all_the_same() -> None:
    """What a newer daemon has and this client has not is no reason to fail."""
    operation = Operation(state="RUNNING")
    operation.kind = 99
    operation.progress.phase = 99
    assert _progress.title(operation) == "99"
    assert _progress.phase_word(operation) == "99"
    operation.state = 99
    assert _progress.phase_word(operation) == "99"


def test_progress_true_shows_on_stderr(double: Double, client: Client, capsys) -> None:
    """``progress=True`` of the library writes to stderr and leaves stdout alone."""
    double.on("DownloadModel", RUNNING)
    double.on("WatchOperation", [RUNNING, DONE])
    client.pull("mini", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["download mini: running", "download mini: succeeded"]


# --- Ctrl-C -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("json_", [False, True], ids=["text", "json"])
def test_ctrl_c_leaves_the_download_running(double: Double, json_) -> None:
    """Interrupted, pull says that the daemon goes on and how to end it, and exits with 130."""
    waiting = threading.Event()

    def stream(request, context):
        yield RUNNING
        waiting.set()
        hold(request, context)

    double.on("DownloadModel", RUNNING)
    double.on("WatchOperation", stream)
    command = [sys.executable, "-m", "modelhost", "--target", double.target, "pull", "mini"]
    child = subprocess.Popen(
        [*command, *(["--json"] if json_ else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stderr is not None
        assert waiting.wait(DEADLINE_S)
        # The first state is shown: from here on the command waits for the next.
        first = (child.stdout if json_ else child.stderr).readline()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=DEADLINE_S)
    finally:
        child.kill()
    assert first
    assert child.returncode == 130
    assert f"the daemon goes on with {NAME}" in err
    assert f"`modelhost cancel {ID}`" in err
    if json_:
        assert json.loads(out.splitlines()[-1]) == {
            "interrupted": {"operation": NAME, "exitCode": 130}
        }
    assert double.requests("CancelOperation") == []


def test_ctrl_c_elsewhere_is_130(double: Double) -> None:
    """Any command that is interrupted exits with 130, without a stack."""
    waiting = threading.Event()

    def stream(request, context):
        waiting.set()
        hold(request, context)

    double.on("GetModel", stream)
    child = subprocess.Popen(
        [sys.executable, "-m", "modelhost", "--target", double.target, "show", "mini"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert waiting.wait(DEADLINE_S)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=DEADLINE_S)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(double: Double, tmp_path: Path) -> None:
    """`modelhost events | head` ends without a stack."""
    from modelhost.v1 import event_service_pb2, events_pb2

    answer = event_service_pb2.ListEventsResponse(
        events=[events_pb2.Event(sequence=s, name="models/m" * 50) for s in range(1, 900)]
    )
    double.on("ListEvents", answer)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "modelhost", "--target", double.target, "events", "--since", "0"],
        stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=DEADLINE_S,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# --- words and numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("12", 12), ("1k", 1024), ("1KiB", 1024), ("1kb", 1000), ("2.5 GiB", 2684354560), ("500MB", 500000000), ("8G", 8 * 2 ** 30), ("1TB", 10 ** 12), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_read(text, count) -> None:
    """KiB and K are powers of 1,024, KB of 1,000."""
    assert read_bytes(text) == count


@pytest.mark.parametrize("text", ["", "x", "-1", "1.2.3", "5 apples", "1e9"])
def test_what_is_no_size_is_refused(text) -> None:
    """Anything else is an error that shows the form."""
    with pytest.raises(ValueError, match="8GiB"):
        read_bytes(text)


def test_sizes_and_spans_are_shown() -> None:
    """Numbers are shown with one decimal, spans with two units."""
    assert [show_bytes(n) for n in (0, 1023, 1024, 1536, 5 * 2**30, 3 * 2**60)] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 GiB", "3072.0 PiB")
    ]
    assert [show_seconds(n) for n in (0.2, 59, 60, 185, 7800, 90000, 86400)] == [
        *("0 s", "59 s", "1 min", "3 min 5 s", "2 h 10 min", "1 d 1 h", "1 d")
    ]


def test_no_control_character_survives() -> None:
    """Of all characters, none that a terminal acts on passes; JSON stays the same document."""
    every = "".join(map(chr, range(0x2100)))
    acting = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u2028\u2029\u202e\u2066\u200f"}
    assert not acting & set(plain(every))
    document = json.dumps({"k": every}, ensure_ascii=False)
    assert not (acting - {"\n"}) & set(plain_json(document))
    assert json.loads(plain_json(document)) == {"k": every}
    assert plain("plain é 漢字 \U0001f600") == "plain é 漢字 \U0001f600"
