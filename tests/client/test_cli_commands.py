"""What each command asks the daemon and what it tells."""

import json
from pathlib import Path

import pytest

from modelhost.v1 import (
    errors_pb2,
    host_pb2,
    model_service_pb2,
    operation_service_pb2,
    operations_pb2,
    residency_service_pb2,
)
from tests.client.double import Double, hold
from tests.client.told import DONE, ID, NAME, RUNNING

# --- what each command asks ---------------------------------------------------------------------------

ASKS = [
    (["pull", "mini"], "DownloadModel", {"name": "models/mini"}),
    (["pull", "mini", "--refresh"], "DownloadModel", {"name": "models/mini", "refresh": True}),
    (
        ["pull", "hf://o/mini", "--name", "mini", "--rate-limit", "5MB", "--priority", "2", "--allow-unsafe"],
        "DownloadModel",
        {"name": "models/mini", "rate_limit_bytes_per_second": 5_000_000, "priority": 2, "allow_unsafe": True},
    ),
    (
        ["pull", "hf://o/mini", "--task", "other", "--include", "*.x", "--exclude", "*.y"],
        "CreateModel",
        {"model": {"task": "other", "source": {"uri": "hf://o/mini", "allow_patterns": ["*.x"], "ignore_patterns": ["*.y"]}}},
    ),
    (
        ["add", "hf://o/mini", "--label", "a=b=c", "--config", "keep_alive=300s", "--config", "load_timeout=9.5", "--config", "max_batch_size=8",
         "--config", "max_batch_delay=0.00005"],
        "CreateModel",
        {"model": {"source": {"uri": "hf://o/mini"}, "labels": {"a": "b=c"}, "config": {"keep_alive": {"seconds": 300}, "load_timeout": {"seconds": 9, "nanos": 500_000_000}, "max_batch_size": 8, "max_batch_delay": {"nanos": 50_000}}}},
    ),
    (["ls", "--state", "available", "--label", "team", "--loaded"], "ListModels",
     {"page_size": 1000, "states": ["AVAILABLE"], "labels": {"team": ""}, "loaded_only": True}),
    (["rm", "mini", "--force"], "DeleteModel", {"name": "models/mini", "force": True}),
    (["rm", "mini", "--files"], "DeleteModelFiles", {"model": "models/mini"}),
    (["load", "mini", "--device", "cpu", "--download"], "LoadModel", {"name": "models/mini", "device": "devices/cpu", "download": True}),
    (["reload", "mini"], "ReloadModel", {"name": "models/mini"}),
    (["reload", "mini", "--version", "1"], "ReloadModel", {"name": "models/mini", "version": 1}),
    (["unload", "mini", "--keep-warm"], "UnloadModel", {"name": "models/mini", "keep_warm": True}),
    (["unload", "--all"], "UnloadModel", {"name": "models/mini"}),
    (["unload", "mini", "--force"], "UnloadModel", {"name": "models/mini", "force": True}),
    (["budget", "host", "8GiB"], "UpdateSettings",
     {"settings": {"host_budget_bytes": 8 << 30}, "update_mask": {"paths": ["host_budget_bytes"]}}),
    (["budget", "host", "0"], "UpdateSettings",
     {"settings": {"host_budget_bytes": 0}, "update_mask": {"paths": ["host_budget_bytes"]}}),
    (["budget", "host", "default"], "UpdateSettings",
     {"settings": {}, "update_mask": {"paths": ["host_budget_bytes"]}}),
    (["budget", "host"], "ListDevices", {"page_size": 1}),
    (["ps", "--device", "cpu"], "ListInstances", {"page_size": 1000, "device": "devices/cpu"}),
    (["pin", "mini"], "PinModel", {"name": "models/mini"}),
    (["unpin", "mini"], "UnpinModel", {"name": "models/mini"}),
    (["storage"], "GetStorage", {}),
    (["storage", "--check", "--deep", "--repair"], "CheckStorage", {"deep": True, "repair": True}),
    (["verify", "mini", "--version", "2"], "VerifyModel", {"name": "models/mini", "version": 2}),
    (["prune"], "PruneStorage", {}),
    (["prune", "--dry-run"], "PruneStorage", {"dry_run": True}),
    (["quarantine", "ls", "--model", "mini"], "ListQuarantine", {"model": "models/mini", "page_size": 1000}),
    (["quarantine", "restore", "1-a"], "RestoreQuarantined", {"name": "quarantine/1-a"}),
    (["pause", ID], "PauseOperation", {"name": NAME}),
    (["resume", ID], "ResumeOperation", {"name": NAME}),
    (["slots", "--model", "mini"], "ListSlots", {"page_size": 1000, "model": "models/mini"}),
    (["switch", "role", "mini", "--unload-previous"], "SwitchSlot",
     {"slot": "slots/role", "model": "models/mini", "unload_previous": True}),
    (["budget", "cpu", "8GiB"], "UpdateDevice",
     {"device": {"name": "devices/cpu", "budget_bytes": 8 * 2**30}, "update_mask": {"paths": ["budget_bytes"]}}),
    (["budget", "cpu", "default"], "UpdateDevice",
     {"device": {"name": "devices/cpu"}, "update_mask": {"paths": ["budget_bytes"]}}),
    (["budget", "cpu"], "GetDevice", {"name": "devices/cpu"}),
    (["rate"], "GetSettings", {}),
    (["rate", "5MB"], "UpdateSettings",
     {"settings": {"download_rate_limit_bytes_per_second": 5_000_000},
      "update_mask": {"paths": ["download_rate_limit_bytes_per_second"]}}),
    (["ops", "ls", "--kind", "download", "-n", "5"], "ListOperations", {"page_size": 5, "kinds": ["DOWNLOAD"]}),
    (["ops", "show", ID], "GetOperation", {"name": NAME}),
    (["ops", "update", ID, "--priority", "3"], "UpdateOperation", {"operation": {"name": NAME, "priority": 3}, "update_mask": {"paths": ["priority"]}}),
    (["ops", "update", ID, "--rate", "2MB"], "UpdateOperation",
     {"operation": {"name": NAME, "rate_limit_bytes_per_second": 2_000_000}, "update_mask": {"paths": ["rate_limit_bytes_per_second"]}}),
    (["ops", "pause", ID], "PauseOperation", {"name": NAME}),
    (["ops", "resume", ID], "ResumeOperation", {"name": NAME}),
    (["ops", "cancel", NAME], "CancelOperation", {"name": NAME}),
    (["cancel", ID], "CancelOperation", {"name": NAME}),
]  # fmt: skip


@pytest.mark.parametrize("json_", [False, True], ids=["text", "json"])
@pytest.mark.parametrize(
    ("arguments", "method", "fields"), ASKS, ids=[" ".join(a) for a, *_ in ASKS]
)
def test_a_command_asks_for_what_it_says(
    told: Double, run, arguments, method, fields, json_
) -> None:
    """The request is the one the words mean; the answer is printed in either format."""
    done = run(*arguments, *(["--json"] if json_ else []))
    assert done.exit_code == 0, done.output
    sent = told.requests(method)[0]
    if "request_id" in sent.DESCRIPTOR.fields_by_name:
        sent.request_id = ""
    assert sent == type(sent)(**fields)
    assert done.stdout
    if json_:
        assert [json.loads(part) for part in done.stdout.replace("\n{", "\0{").split("\0")]


def test_pull_says_what_it_brought(told: Double, run) -> None:
    """The end of a download is a sentence on stdout, its progress lines on stderr."""
    told.on("DownloadModel", RUNNING)
    moving = operations_pb2.Operation()
    moving.CopyFrom(RUNNING)
    moving.progress.phase = operations_pb2.OperationProgress.DOWNLOADING
    moving.progress.done_bytes, moving.progress.total_bytes = 512, 1024
    moving.progress.bytes_per_second = 256
    moving.progress.eta.seconds = 2
    told.on("WatchOperation", [RUNNING, moving, moving, DONE])
    done = run("pull", "mini")
    assert done.exit_code == 0
    assert done.stdout == (
        "download mini: 2 files, 1.0 KiB (0 B already here), version 1, revision abc\n"
    )
    assert done.stderr.splitlines() == [
        "download mini: running",
        "download mini: downloading 50 % 512 B of 1.0 KiB, 256 B/s, 2 s left",
        "download mini: succeeded",
    ]


def test_a_followed_operation_is_json_lines(told: Double, run) -> None:
    """With --json each state is a line; the last is the end."""
    told.on("DownloadModel", RUNNING)
    told.on("WatchOperation", [RUNNING, DONE])
    lines = [json.loads(line) for line in run("pull", "mini", "--json").stdout.splitlines()]
    assert [line["state"] for line in lines] == ["RUNNING", "SUCCEEDED"]
    assert lines[-1]["downloadResult"]["fileCount"] == 2


@pytest.mark.parametrize("command", [["pull", "mini"], ["load", "mini"]], ids=lambda c: c[0])
def test_detached_work_prints_its_operation(told: Double, run, command) -> None:
    """With --detach the id comes at once, and nothing waits."""
    told.on("DownloadModel", RUNNING)
    told.on("LoadModel", RUNNING)
    assert run(*command, "-d").stdout == f"{ID}\tmini\n"
    assert json.loads(run(*command, "-d", "--json").stdout)["name"] == NAME
    assert told.requests("WatchOperation") == []


def test_waiting_too_long_is_7_and_cancels_nothing(told: Double, run) -> None:
    """--timeout ends the waiting, not the work."""
    told.on("LoadModel", RUNNING)
    told.on("WatchOperation", hold)
    done = run("load", "mini", "--timeout", "0.05")
    assert done.exit_code == 7
    assert f"modelhost ops wait {ID}" in done.stderr
    assert told.requests("CancelOperation") == []


def test_a_lease_lasts_as_long_as_the_command(told: Double, run, tmp_path: Path) -> None:
    """lease holds the model, runs the command with its own options, releases, and exits as it did."""
    mark = tmp_path / "mark"
    for code in (0, 3):
        done = run("lease", "mini", "sh", "-c", f"echo ran >> {mark}; exit {code}")
        assert done.exit_code == code, done.output
    assert mark.read_text() == "ran\n" * 2
    asked = told.requests("AcquireLease")
    assert [(r.model, r.time_to_live.seconds) for r in asked] == [("models/mini", 60)] * 2
    assert [r.name for r in told.requests("ReleaseLease")] == ["leases/one"] * 2


def test_a_lease_without_its_command_is_released(told: Double, run) -> None:
    """A command that is not there is an error of the command line, and holds nothing."""
    assert run("lease", "mini", "no-such-command-here").exit_code == 2
    assert len(told.requests("ReleaseLease")) == 1


@pytest.mark.parametrize(
    ("command", "result"),
    [(["verify", "mini"], "verify_result"), (["storage", "--check"], "check_storage_result")],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_findings_are_told_and_are_exit_code_1(told: Double, run, command, result) -> None:
    """What was found and not mended is a line each and a failure; what was mended is none."""
    for repaired, code in ((False, 1), (True, 0)):
        finding = {"kind": "corrupt_file", "message": "w is not what it was", "repaired": repaired}
        done = operations_pb2.Operation(
            name=NAME, kind="VERIFY", state="SUCCEEDED", **{result: {"findings": [finding]}}
        )
        told.on("VerifyModel", done)
        told.on("CheckStorage", done)
        ended = run(*command)
        assert ended.exit_code == code, ended.output
        assert "corrupt_file\tw is not what it was" in ended.stdout


def test_a_quarantined_file_is_removed(told: Double, run) -> None:
    """quarantine rm says what it did; --deep without --check is a wrong command line."""
    assert run("quarantine", "rm", "1-a").stdout == "1-a is deleted\n"
    assert told.requests("DeleteQuarantined")[0].name == "quarantine/1-a"
    assert run("storage", "--deep").exit_code == 2


def test_switch_takes_a_model_or_clears(told: Double, run) -> None:
    """One of the two: both or neither is a wrong command line."""
    assert run("switch", "role").exit_code == 2
    assert run("switch", "role", "mini", "--clear").exit_code == 2
    assert run("switch", "role", "--clear", "--unload-previous").exit_code == 2
    assert run("switch", "role", "--clear", "--detach").exit_code == 2
    done = run("switch", "role", "--clear", "--etag", "2")
    assert (done.exit_code, done.stdout) == (0, "role is cleared\n")
    assert told.requests("ClearSlot")[0] == residency_service_pb2.ClearSlotRequest(
        name="slots/role", etag="2"
    )


@pytest.mark.parametrize("command", [["pause"], ["ops", "resume"], ["cancel"], ["ops", "show"]])
def test_an_operation_may_be_named_by_its_model(told: Double, run, command) -> None:
    """The one that is under way on it; several are told apart by id, and none is OPERATION_NOT_FOUND."""
    told.on("ListOperations", operation_service_pb2.ListOperationsResponse(operations=[RUNNING]))
    assert run(*command, "mini").exit_code == 0
    (asked,) = told.requests("ListOperations")
    assert asked.model == "models/mini"
    assert [operations_pb2.Operation.State.Name(s) for s in asked.states] == [
        "QUEUED",
        "RUNNING",
        "PAUSED",
    ]
    assert told.requests("GetOperation")[0].name == NAME
    told.on(
        "ListOperations", operation_service_pb2.ListOperationsResponse(operations=[RUNNING] * 2)
    )
    done = run(*command, "mini")
    assert done.exit_code == 2
    assert ID in done.output
    told.on("ListOperations", operation_service_pb2.ListOperationsResponse())
    run(*command, "mini")
    assert told.requests("GetOperation")[-1].name == "operations/mini"


def test_ops_wait_follows_to_the_end(told: Double, run) -> None:
    """ops wait exits as the operation ends."""
    cancelled = operations_pb2.Operation(
        name=NAME, state="CANCELLED", error={"reason": "CANCELLED", "code": "CANCELLED"}
    )
    told.on("WatchOperation", [RUNNING, cancelled])
    assert run("ops", "wait", ID).exit_code == 1
    told.on("WatchOperation", [RUNNING, DONE])
    assert run("ops", "wait", ID).exit_code == 0


def test_show_tells_files_config_and_instance(told: Double, run) -> None:
    """One model with all that hangs on it, config values in words."""
    text = run("show", "mini").stdout
    for line in (
        *("model\tmodels/mini", "source\thf://o/mini@main", "labels\tteam=a", "pinned\tyes"),
        *(
            "config.isolation\tprocess",
            "config.keep_alive\t5 min",
            "instance\tmodels/mini/instances/1",
        ),
        "2\tAVAILABLE\tabc\t3\t1536\t0\t\t",
    ):
        assert line in text.splitlines()


def test_status_shows_the_daemon_and_its_devices(told: Double, run) -> None:
    """A daemon without statistics is shown all the same; with them they are added."""
    text = run("status").stdout
    assert "daemon\tmodelhost 9.9 on box, process 7" in text
    assert "cpu\tSome CPU\t0\t1073741824" in text
    told.on("GetStatistics", host_pb2.Statistics(model_count=3, request_count=5, error_count=1))
    assert "requests\t5, 1 with an error" in run("status").stdout
    shown = json.loads(run("status", "--json").stdout)
    assert shown["target"] == told.target
    assert shown["statistics"]["modelCount"] == 3


def test_status_warns_of_what_does_not_work(told: Double, run) -> None:
    """A source that is unreachable and a backend that is not available are named with the reason."""
    host = host_pb2.Host(
        sources=[{"scheme": "hf", "state": "UNREACHABLE", "message": "no route"}],
        backends=[{"id": "torch-export", "message": "package torch is not installed"}],
    )
    told.on("GetHost", host)
    text = run("status").stdout
    assert "note: source hf" in text
    assert "package torch is not installed" in text


def test_version_tells_both(told: Double, run) -> None:
    """The client's version and the daemon's."""
    assert "daemon\t9.9" in run("version").stdout


def test_inspect_tells_what_a_pull_would_fetch(double: Double, run) -> None:
    """Facts, files and what would be left out."""
    double.on(
        "InspectSource",
        model_service_pb2.InspectSourceResponse(
            source={"uri": "hf://o/n"}, model_id="n", file_count=1, size_bytes=2048, gated=True,
            files=[{"path": "a.bin", "size_bytes": 2048}],
            skipped_files=[{"path": "b.pkl", "message": "pickle"}],
        ),
    )  # fmt: skip
    text = run("inspect", "hf://o/n").stdout
    for line in (
        "download\t1 file, 2.0 KiB",
        "gated\tyes",
        "a.bin\t2048",
        "left out: b.pkl (pickle)",
    ):
        assert line in text.splitlines()


def test_check_exits_5_where_a_model_cannot_work(double: Double, run) -> None:
    """Each check is a line; one that failed is exit code 5, in every format."""
    answer = model_service_pb2.CheckCompatibilityResponse(
        checks=[{"id": "packages", "outcome": "FAILED", "needed": "x", "message": "install x"}]
    )
    double.on("CheckCompatibility", answer)
    done = run("check", "m", "--device", "cpu")
    assert done.exit_code == 5
    assert done.stdout == "packages\tFAILED\tx\t\tinstall x\n"
    assert run("check", "m", "--json").exit_code == 5
    answer.compatible = True
    assert run("check", "m").exit_code == 0


def test_plan_tells_who_would_go(double: Double, run) -> None:
    """An admitted load names place and victims with exit code 0."""
    double.on(
        "PlanLoad",
        residency_service_pb2.PlanLoadResponse(
            placement={
                "device": "devices/cpu", "source_tier": "DISK",
                "victims": [
                    {"model": "models/old", "freed_bytes": 1024, "busy": True, "tier_after": "DISK"},
                    {"model": "models/older", "freed_bytes": 1024, "tier_after": "HOST"},
                ],
                "host_bytes": 2048,
                "dropped": [
                    {"model": "models/warm", "freed_bytes": 1024, "tier_after": "DISK"},
                    {"model": "models/there", "freed_bytes": 1024, "tier_after": "DEVICE"},
                ],
            },
            needed_bytes=2048,
        ),
    )  # fmt: skip
    done = run("plan", "m")
    assert done.exit_code == 0
    assert "load\twould be loaded on cpu from disk" in done.stdout
    assert "would evict\told (1.0 KiB, busy now)" in done.stdout
    assert "would evict\tolder (1.0 KiB, stays warm)" in done.stdout
    assert "host memory\t2.0 KiB for a copy" in done.stdout
    assert "would drop\twarm (1.0 KiB of host memory)" in done.stdout
    assert "would drop\tthere (1.0 KiB of host memory, stays on its device)" in done.stdout


def test_plan_exits_as_the_load_would(double: Double, run) -> None:
    """A refusal is printed as an answer, and the exit code is the one that load would have."""
    refusal = errors_pb2.Error(
        reason="MODEL_TOO_LARGE", code="RESOURCE_EXHAUSTED", message="too large"
    )
    double.on("PlanLoad", residency_service_pb2.PlanLoadResponse(refusal=refusal))
    done = run("plan", "m")
    assert done.exit_code == 6
    assert "would be refused: too large [MODEL_TOO_LARGE]" in done.stdout
