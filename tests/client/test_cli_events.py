"""The command events: what happened and what happens."""

import json

import grpc

from modelhost.v1 import (
    event_service_pb2,
    events_pb2,
)
from tests.client.double import Double
from tests.client.told import INSTANCE, MODEL, NAME

# --- events -------------------------------------------------------------------------------------------


def event(sequence: int) -> events_pb2.Event:
    return events_pb2.Event(
        sequence=sequence, name="models/mini", kind="MODEL", change="UPDATED", reason="PINNED",
        time={"seconds": 1_700_000_000}, resource={"model": MODEL}, details={"b": "2", "a": "1"},
    )  # fmt: skip


def history(*sequences: int) -> event_service_pb2.ListEventsResponse:
    return event_service_pb2.ListEventsResponse(events=[event(s) for s in sequences])


LINE = "\t2023-11-14T22:13:20.000Z\tMODEL\tmodels/mini\tUPDATED\tPINNED\tAVAILABLE pinned a=1 b=2\n"


def test_events_are_one_line_each(told: Double, run) -> None:
    """Events behind a sequence, as lines and as JSON lines."""
    told.on("ListEvents", history(39, 40))
    assert run("events", "--since", "38").stdout == f"39{LINE}40{LINE}"
    lines = run("events", "--since", "38", "--json").stdout.splitlines()
    assert [json.loads(line)["event"]["sequence"] for line in lines] == ["39", "40"]
    assert {r.start_sequence for r in told.requests("ListEvents")} == {39}


def test_events_shows_the_last_ones(told: Double, run) -> None:
    """Without a sequence the last few come, as far as they are kept."""
    told.on("ListEvents", history(1))
    run("events", "-n", "5")
    assert [r.start_sequence for r in told.requests("ListEvents")] == [0, 36]
    told.calls.clear()
    told.on("ListEvents", history(38))
    run("events", "-n", "5")
    assert [r.start_sequence for r in told.requests("ListEvents")] == [0, 38]


def test_a_snapshot_ends_with_its_bookmark(told: Double, run) -> None:
    """--snapshot without -f prints the present and ends."""
    answer = event_service_pb2.WatchEventsResponse
    parts = answer()
    parts.snapshot.resources.add().model.CopyFrom(MODEL)
    parts.snapshot.resources.add().instance.CopyFrom(INSTANCE)
    told.on("WatchEvents", [parts, answer(bookmark={"sequence": 40, "store_id": "s"})])
    assert run("events", "--snapshot").stdout == (
        "\t\tMODEL\tmodels/mini\tPRESENT\t\tAVAILABLE pinned\n"
        "\t\tINSTANCE\tmodels/mini/instances/1\tPRESENT\t\tREADY devices/cpu\n"
        "40\t\t\t\tBOOKMARK\t\t\n"
    )
    kinds = [
        list(json.loads(line)) for line in run("events", "--snapshot", "--json").stdout.splitlines()
    ]
    assert kinds == [["resource"], ["resource"], ["bookmark"]]


def test_following_goes_on_behind_the_history(told: Double, run) -> None:
    """-f shows the past first and then each new event, none twice; a refusal ends it."""
    answer = event_service_pb2.WatchEventsResponse
    told.on("ListEvents", history(40))

    def stream(request, context):
        yield answer(bookmark={"sequence": 40, "store_id": "s"})
        yield answer(events=[event(41)])
        sample = {"operation": NAME, "progress": {"done_bytes": 5, "total_bytes": 10}}
        yield answer(progress_samples=[sample])
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "enough")

    told.on("WatchEvents", stream)
    done = run("events", "-f", "--since", "39", "--progress", "--model", "mini")
    assert done.exit_code == 1
    assert done.stdout == (f"40{LINE}41{LINE}\t\tOPERATION\t{NAME}\tPROGRESS\t\t5 B of 10 B\n")
    (request,) = told.requests("WatchEvents")
    assert request.start_sequence == 41
    assert list(request.filter.models) == ["models/mini"]


def test_progress_without_following_is_refused(told: Double, run) -> None:
    """It would show nothing: progress is never in the past."""
    done = run("events", "--progress")
    assert (done.exit_code, told.calls) == (2, [])
    assert "--follow" in done.stderr
