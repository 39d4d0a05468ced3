"""How the command line prints and exits: formats, unsafe text, exit codes."""

import io
import json
import sys
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from modelhost.cli.app import app
from modelhost.cli.output import Output
from modelhost.v1 import (
    model_service_pb2,
    models_pb2,
    operations_pb2,
    residency_service_pb2,
)
from tests.client.double import Double, failure, hold
from tests.client.told import NAME

# --- the three formats --------------------------------------------------------------------------------


def test_lines_are_for_scripts(told: Double, run) -> None:
    """Without a terminal a list is tab-separated values, without a header, with numbers as numbers."""
    done = run("ls")
    assert done.exit_code == 0
    assert (
        done.stdout == "mini\tfeature-extraction\tAVAILABLE\t1536\tREADY\ttrue\thf://o/mini@main\n"
    )


def test_tables_are_for_people(told: Double, run) -> None:
    """A table has a header, and sizes with units."""
    done = run("--format", "table", "ls")
    header, row = done.stdout.rstrip().splitlines()
    assert header.split() == ["MODEL", "TASK", "FILES", "SIZE", "INSTANCE", "PINNED", "SOURCE"]
    assert row.split() == [
        *(
            "mini",
            "feature-extraction",
            "available",
            "1.5",
            "KiB",
            "ready",
            "yes",
            "hf://o/mini@main",
        )
    ]


def test_no_table_cuts_a_name(double: Double, run) -> None:
    """A cell that is longer than the line is printed whole, on one line, to be copied."""
    name = "models/" + "m" * 64
    source = models_pb2.Source(uri="hf://" + "o" * 90 + "/" + "n" * 90)
    answer = model_service_pb2.ListModelsResponse(
        models=[models_pb2.Model(name=name, source=source)]
    )
    double.on("ListModels", answer)
    double.on("ListInstances", residency_service_pb2.ListInstancesResponse())
    _, row = run("--format", "table", "ls").stdout.splitlines()
    assert row.split()[0] == "m" * 64
    assert row.split()[-1] == source.uri


def test_json_is_the_contracts(told: Double, run) -> None:
    """--json, before or behind the command, prints the messages in the contract's JSON."""
    for arguments in (["--json", "ls"], ["ls", "--json"], ["ls", "--format", "json"]):
        (model,) = json.loads(run(*arguments).stdout)
        assert model["name"] == "models/mini"
        assert model["state"] == "AVAILABLE"
        assert model["artifacts"][0]["sizeBytes"] == "1536"
        assert model["description"] == ""


def test_an_empty_list_says_what_to_do(double: Double, run) -> None:
    """A person who sees no models is told how to get one; a script sees nothing."""
    double.on("ListModels", model_service_pb2.ListModelsResponse())
    double.on("ListInstances", residency_service_pb2.ListInstancesResponse())
    assert "modelhost pull" in run("--format", "table", "ls").stderr
    assert run("ls").output == ""


ESCAPES = "a\x1b]0;owned\x07b\u202ec\x9bd\ne"


@pytest.mark.parametrize("format_", ["auto", "table", "json"])
def test_names_from_outside_do_not_reach_the_terminal(double: Double, run, format_) -> None:
    """Escape sequences and direction marks are written out, in every format."""
    model = models_pb2.Model(
        name="models/m", task=ESCAPES, description=ESCAPES, labels={"k": ESCAPES}
    )
    double.on("GetModel", model)
    double.on("ListInstances", residency_service_pb2.ListInstancesResponse())
    done = run("--format", format_, "show", "m")
    assert done.exit_code == 0
    assert not set(done.output) & set("\x1b\x07\x9b\u202e")
    if format_ == "json":
        assert json.loads(done.stdout)["model"]["task"] == ESCAPES
    else:
        assert "a\\x1b]0;owned\\x07b\\u202ec\\x9bd\\x0ae" in done.stdout


def test_markup_from_outside_is_text(double: Double, run) -> None:
    """What looks like markup of the table's library is printed as it is."""
    double.on("GetModel", models_pb2.Model(name="models/m", description="[red]x[/red] [link=y]z"))
    double.on("ListInstances", residency_service_pb2.ListInstancesResponse())
    assert "[red]x[/red] [link=y]z" in run("--format", "table", "show", "m").stdout


def test_errors_from_outside_do_not_reach_the_terminal(double: Double, run) -> None:
    """The text of an error is shown with its controls written out."""
    double.on("GetModel", failure(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no \x1b[2J model"))
    done = run("show", "m")
    assert "no \\x1b[2J model" in done.stderr


# --- exit codes ---------------------------------------------------------------------------------------

S = grpc.StatusCode
EXITS = [
    (failure(S.NOT_FOUND, "MODEL_NOT_FOUND"), 3),
    (failure(S.UNAVAILABLE), 4),
    (failure(S.UNAVAILABLE, "SHUTTING_DOWN"), 4),
    (failure(S.UNAVAILABLE, "NETWORK_ERROR"), 1),
    (failure(S.FAILED_PRECONDITION, "MODEL_NOT_DOWNLOADED", metadata={"model": "m"}), 5),
    (failure(S.ALREADY_EXISTS, "ALREADY_EXISTS", metadata={"name": "models/m"}), 5),
    (failure(S.ABORTED, "ETAG_MISMATCH"), 5),
    (failure(S.RESOURCE_EXHAUSTED, "OUT_OF_DEVICE_MEMORY"), 6),
    (failure(S.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE"), 6),
    (failure(S.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_delay=2), 1),
    (failure(S.DEADLINE_EXCEEDED, "LOAD_TIMEOUT"), 7),
    (failure(S.INVALID_ARGUMENT, "INVALID_ARGUMENT"), 2),
    (failure(S.INTERNAL, "INTERNAL"), 1),
    (failure(S.UNIMPLEMENTED, "UNIMPLEMENTED"), 1),
    (failure(S.PERMISSION_DENIED, "PERMISSION_DENIED"), 1),
]


@pytest.mark.parametrize(
    ("answer", "code"), EXITS, ids=[f"{c}-{i}" for i, (_, c) in enumerate(EXITS)]
)
def test_each_kind_of_failure_has_its_exit_code(double: Double, run, answer, code) -> None:
    """Scripts tell failures apart by the exit code, without a word on stdout."""
    double.on("LoadModel", answer)
    done = run("load", "m")
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.startswith("modelhost: ")


def test_the_exit_code_of_an_operation_is_that_of_its_error(double: Double, run) -> None:
    """A load that fails later exits as one that is refused at once."""
    failed = operations_pb2.Operation(
        name=NAME, kind="LOAD", state="FAILED",
        error={"reason": "OUT_OF_DEVICE_MEMORY", "code": "RESOURCE_EXHAUSTED", "message": "no room"},
    )  # fmt: skip
    double.on("LoadModel", failed)
    done = run("load", "m")
    assert done.exit_code == 6
    assert "no room" in done.stderr


def test_an_unreachable_daemon_is_4_at_once(tmp_path: Path) -> None:
    """No daemon: the target, the reason and the next command, without a second try."""
    target = f"unix:{tmp_path}/none.sock"
    done = CliRunner().invoke(app, ["--target", target, "ls"])
    assert done.exit_code == 4
    assert target in done.stderr
    assert "next: start it with `modelhost serve`" in done.stderr


def test_a_call_without_an_answer_is_7(double: Double, run) -> None:
    """--timeout bounds a call."""
    double.on("GetModel", hold)
    assert run("--timeout", "0.05", "show", "m").exit_code == 7


def test_an_error_is_an_object_with_json(double: Double, run) -> None:
    """With --json stdout has the whole error, the exit code in it; stderr still speaks to people."""
    double.on(
        "GetModel",
        failure(S.NOT_FOUND, "MODEL_NOT_FOUND", "no model m", {"model": "m"}, request_id="r-9"),
    )
    done = run("show", "m", "--json")
    assert json.loads(done.stdout)["error"] == {
        "code": "NOT_FOUND",
        "reason": "MODEL_NOT_FOUND",
        "message": "no model m",
        "metadata": {"model": "m"},
        "hint": "`modelhost ls` lists the models, `modelhost pull SOURCE` adds one",
        "retryDelay": None,
        "requestId": "r-9",
        "exitCode": 3,
    }
    assert done.stderr.splitlines() == [
        "modelhost: no model m [MODEL_NOT_FOUND]",
        "  next: `modelhost ls` lists the models, `modelhost pull SOURCE` adds one",
        "  request: r-9",
    ]


def test_a_hint_is_not_said_twice(double: Double, run) -> None:
    """Where the daemon's message names the commands already, the hint is left out."""
    message = "no model; `modelhost ls` lists them, `modelhost pull` adds one"
    double.on("GetModel", failure(S.NOT_FOUND, "MODEL_NOT_FOUND", message))
    assert "next:" not in run("show", "m").stderr


def test_json_into_what_has_no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that collects the output in a text of its own gets what a pipe gets."""
    collected = io.StringIO()
    monkeypatch.setattr(sys, "stdout", collected)
    Output("json").document({"text": "東京"})
    assert collected.getvalue() == '{\n  "text": "東京"\n}\n'
