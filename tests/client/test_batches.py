"""Several models at once: each with its own end, one summary, one exit code; bars for files and for all."""

import io
import json
import signal
import subprocess
import sys
import threading

import grpc
import pytest
from rich.console import Console

from modelhost import Client, Timeout, _progress
from modelhost.v1 import errors_pb2, operations_pb2
from tests.client.double import Double, failure
from tests.client.told import DONE, NAME, RUNNING
from tests.support import DEADLINE_S

Operation = operations_pb2.Operation


def named(model: str, state: str, **fields) -> Operation:
    """Return the download of a model."""
    return Operation(
        name=f"operations/{model}", kind="DOWNLOAD", model=f"models/{model}", state=state, **fields
    )


def failed(model: str) -> Operation:
    """Return a download that could not be done."""
    operation = named(model, "FAILED")
    operation.error.code = errors_pb2.Error.DATA_LOSS
    operation.error.reason = "CHECKSUM_MISMATCH"
    operation.error.message = f"{model}: expected a, got b"
    return operation


@pytest.fixture
def three(double: Double) -> Double:
    """A daemon where ``good`` and ``late`` end well, ``bad`` does not, and ``none`` is not there."""
    looks: dict[str, int] = {}
    absent = failure(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no such model")

    def begin(request, context):
        model = request.name.removeprefix("models/")
        if model == "none":
            return absent(request, context)
        return named(model, "RUNNING", priority=request.priority)

    def look(request, context):
        model = request.name.removeprefix("operations/")
        looks[model] = looks.get(model, 0) + 1
        if model == "bad":
            return failed(model)
        if model == "late" and looks[model] < 4:
            return named(model, "RUNNING", progress={"done_bytes": looks[model], "total_bytes": 9})
        result = {"file_count": 2, "size_bytes": 1024, "version": 1, "revision": "abc"}
        return named(model, "SUCCEEDED", download_result=result)

    double.on("DownloadModel", begin)
    double.on("GetOperation", look)
    return double


def test_each_of_a_batch_has_a_result_of_its_own(three: Double, both) -> None:
    """In the order asked for; one that fails, or that cannot begin, is no reason for another to."""
    seen = []
    outcomes = both(
        lambda c: c.pull_all(["late", "bad", "none", "good"], priority=2, progress=seen.append)
    )
    assert [outcome.asked for outcome in outcomes] == ["late", "bad", "none", "good"]
    assert [outcome.ok for outcome in outcomes] == [True, False, False, True]
    reasons = [outcome.error.reason if outcome.error else "" for outcome in outcomes]
    assert reasons == ["", "CHECKSUM_MISMATCH", "MODEL_NOT_FOUND", ""]
    assert outcomes[0].operation.state == Operation.SUCCEEDED
    assert {request.priority for request in three.requests("DownloadModel")} == {2}
    assert all(request.include_files for request in three.requests("GetOperation"))
    states = [(o.model, o.state, o.progress.done_bytes) for o in seen]
    assert len(states) == len(set(states)), "what did not change was reported again"


def test_what_does_not_end_in_time_goes_on(double: Double, both) -> None:
    """The others' results are there; nothing is cancelled."""
    double.on("DownloadModel", lambda r, _: named(r.name.removeprefix("models/"), "RUNNING"))
    double.on(
        "GetOperation",
        lambda r, _: named(
            r.name.removeprefix("operations/"), "SUCCEEDED" if "good" in r.name else "RUNNING"
        ),
    )
    outcomes = both(lambda c: c.pull_all(["never", "good"], timeout=5.0))
    assert isinstance(outcomes[0].error, Timeout)
    assert outcomes[1].ok
    assert double.requests("CancelOperation") == []


def test_a_batch_outlives_a_restart_of_the_daemon(double: Double, client: Client) -> None:
    """A connection that breaks is made again, and every result is there."""
    looked = []

    def look(request, context):
        looked.append(request.name)
        if len(looked) < 3:
            context.abort(grpc.StatusCode.CANCELLED, "gone for a moment")
        return named(request.name.removeprefix("operations/"), "SUCCEEDED")

    double.on("DownloadModel", lambda r, _: named(r.name.removeprefix("models/"), "RUNNING"))
    double.on("GetOperation", look)
    assert [outcome.ok for outcome in client.pull_all(["a", "b"])] == [True, True]


def test_the_summary_tells_each_and_the_exit_code_that_one_failed(three: Double, run) -> None:
    """A line for each in the order asked for; what failed is said on stderr with its reason."""
    done = run("pull", "late", "bad", "none", "good")
    assert done.exit_code == 1
    brought = "2 files, 1.0 KiB (0 B already here), version 1, revision abc"
    assert done.stdout.splitlines() == [
        f"late\tlate\twell\t{brought}",
        "bad\tbad\tfailed\tCHECKSUM_MISMATCH",
        "none\t\tfailed\tMODEL_NOT_FOUND",
        f"good\tgood\twell\t{brought}",
    ]
    assert "modelhost: bad: expected a, got b [CHECKSUM_MISMATCH]" in done.stderr
    assert "modelhost: none: no such model [MODEL_NOT_FOUND]" in done.stderr
    assert "download good: succeeded" in done.stderr


def test_a_batch_that_ends_well_is_0_and_alike_failures_keep_their_code(three: Double, run) -> None:
    """Scripts can tell what is not there from what broke."""
    assert run("pull", "late", "good").exit_code == 0
    assert run("pull", "none", "none", "good").exit_code == 3
    table = run("pull", "good", "bad", "--format", "table")
    assert "1 of 2 pulls ended well" in table.stdout


def test_the_summary_is_the_last_json_line(three: Double, run) -> None:
    """After a line for each state of each."""
    done = run("pull", "good", "bad", "--json")
    *states, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert {state["name"] for state in states} == {"operations/good", "operations/bad"}
    assert [(one["asked"], one["ok"]) for one in last["summary"]] == [
        ("good", True),
        ("bad", False),
    ]
    assert last["summary"][1]["error"]["reason"] == "CHECKSUM_MISMATCH"
    assert last["summary"][0]["operation"]["downloadResult"]["fileCount"] == 2


def test_a_detached_batch_prints_its_operations(three: Double, run) -> None:
    """And fails for what could not begin."""
    done = run("pull", "a", "none", "b", "-d")
    assert done.stdout.splitlines() == ["a\ta", "b\tb"]
    assert done.exit_code == 3
    assert three.requests("GetOperation") == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "b", "--name", "x"],
        ["a", "b", "--task", "x"],
        ["a", "b", "--revision", "x"],
        ["a", "b", "--url", "https://h/x"],
    ],
)
def test_what_is_for_one_model_is_not_for_several(three: Double, run, arguments) -> None:
    """A wrong command line is 2, and nothing is asked of the daemon."""
    assert run("pull", *arguments).exit_code == 2
    assert three.calls == []


def test_several_urls_are_one_model(double: Double, run) -> None:
    """With and without a first one as SOURCE; revision and rate have options of their own."""
    from modelhost.v1 import models_pb2

    double.on("CreateModel", models_pb2.Model(name="models/x"))
    double.on("DownloadModel", DONE)
    for first in (["https://h/a"], ["--url", "https://h/a"]):
        assert run("pull", *first, "--url", "https://h/b", "--name", "x").exit_code == 0
    assert run("pull", "hf://o/n", "--revision", "v1", "--rate", "5MB").exit_code == 0
    sources = [request.model.source for request in double.requests("CreateModel")]
    assert (
        sources[0] == sources[1] == models_pb2.Source(uri="https://h/a", more_uris=["https://h/b"])
    )
    assert sources[2] == models_pb2.Source(uri="hf://o/n", revision="v1")
    assert double.requests("DownloadModel")[2].rate_limit_bytes_per_second == 5_000_000


def test_ctrl_c_leaves_all_of_them_running(double: Double) -> None:
    """Each is named with how to wait for it and how to end it; the exit code is that of any Ctrl-C."""
    waiting = threading.Event()

    def look(request, _context):
        waiting.set()
        return named(request.name.removeprefix("operations/"), "RUNNING")

    double.on("DownloadModel", lambda r, _: named(r.name.removeprefix("models/"), "RUNNING"))
    double.on("GetOperation", look)
    command = [sys.executable, "-m", "modelhost", "--target", double.target, "pull", "a", "b"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert waiting.wait(DEADLINE_S)
        assert child.stderr is not None
        # The first state is shown: from here on the command waits for the next.
        assert child.stderr.readline()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=DEADLINE_S)
    finally:
        child.kill()
    assert child.returncode == 130
    for name in ("a", "b"):
        assert f"the daemon goes on with operations/{name}" in err
        assert f"`modelhost cancel {name}`" in err
    assert double.requests("CancelOperation") == []


# --- bars ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(*operations: Operation) -> str:
    """Return what a terminal shows of states of operations, one after the other."""
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=160, color_system=None)
    with _progress.shown(stream, console) as report:
        for operation in operations:
            report(operation)
    return stream.getvalue()


def downloading(model: str, done: int, total: int, **files: tuple[int, int]) -> Operation:
    """Return a download under way with its files."""
    operation = named(model, "RUNNING")
    operation.progress.phase = operations_pb2.OperationProgress.DOWNLOADING
    operation.progress.done_bytes, operation.progress.total_bytes = done, total
    operation.progress.bytes_per_second = 1024
    for path, (part, size) in files.items():
        operation.progress.files.add(path=path, done_bytes=part, size_bytes=size)
    return operation


def test_a_terminal_has_a_bar_for_each_file_under_way() -> None:
    """With its bytes; what has not begun or has ended has none."""
    text = shown(downloading("m", 600, 2048, first=(512, 1024), second=(0, 512), third=(88, 88)))
    assert "first" in text
    assert "512 B of 1.0 KiB" in text
    assert "second" not in text
    assert "third" not in text


def test_several_operations_have_a_bar_for_all() -> None:
    """Bytes, rate and time left of all together, and how many have ended."""
    text = shown(
        downloading("a", 1024, 4096), downloading("b", 2048, 4096), named("c", "SUCCEEDED")
    )
    assert "3.0 KiB of 8.0 KiB, 2.0 KiB/s, 2 s left" in text
    assert "1 of 3 ended" in text


def test_one_operation_has_no_bar_for_all() -> None:
    """It would be the same bar again."""
    assert "ended" not in shown(downloading("a", 1024, 4096))


def test_a_retry_is_a_line_of_its_own_and_says_when() -> None:
    """Away from a terminal: why, how often, and in how many seconds; once for each try."""
    stream = io.StringIO()
    with _progress.shown(stream) as report:
        for attempt in (1, 1, 2):
            operation = downloading("m", 10, 100)
            operation.progress.retry.reason = "NETWORK_ERROR"
            operation.progress.retry.attempt = attempt
            operation.progress.retry.next_time.FromSeconds(4_000_000_000)
            report(operation)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "again after NETWORK_ERROR (1) in " in lines[0]
    assert "again after NETWORK_ERROR (2) in " in lines[1]


def test_what_is_done_does_not_wait() -> None:
    """Work so quick that nobody was told of its beginning is not shown as queued with all of its bytes done."""
    quick = operations_pb2.Operation(state="QUEUED", queue_position=1)
    assert _progress.phase_word(quick) == "queued (1)"
    quick.progress.total_bytes = quick.progress.done_bytes = 7
    assert _progress.phase_word(quick) == "running"


def test_the_words_of_a_retry() -> None:
    """Without a moment, or with one that has come, nothing is said of it."""
    retry = operations_pb2.OperationProgress.Retry(attempt=3, reason="OFFLINE")
    assert _progress.retry_words(retry) == "again after OFFLINE (3)"
    retry.next_time.FromSeconds(100)
    assert _progress.retry_words(retry, 70.0) == "again after OFFLINE (3) in 30 s"
    assert _progress.retry_words(retry, 100.0) == "again after OFFLINE (3)"


def test_following_one_operation_asks_for_its_files(double: Double, client: Client) -> None:
    """Where somebody looks; otherwise not."""
    double.on("DownloadModel", RUNNING)
    double.on("WatchOperation", [RUNNING, DONE])
    client.pull("mini", progress=lambda _: None)
    client.pull("mini")
    asked = [request.include_files for request in double.requests("WatchOperation")]
    assert asked == [True, False]
    assert {request.name for request in double.requests("WatchOperation")} == {NAME}
