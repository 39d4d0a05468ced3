"""SIGTERM: the daemon exits whatever its clients, workers and sources do, and tells those who listen."""

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2

from modelhost import Client
from modelhost.v1 import operation_service_pb2
from tests import event_validators as validate
from tests.api.serving import info_of
from tests.ending.scene import (
    BURDENS,
    CALL_S,
    LARGE,
    MODEL,
    Scene,
    Watcher,
    all_burdens,
    health,
    infer,
    scene,
)
from tests.support import wait_until

SHORT = (
    *("--set", "shutdown.drain_timeout_s=1"),
    *("--set", "shutdown.worker_timeout_s=1"),
)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def at():
    """A daemon with a loaded model that gives others little time when it ends."""
    with scene(*SHORT) as made:
        yield made.loaded()


@pytest.mark.parametrize("name", [*BURDENS, "everything"])
def test_it_exits_with_zero(at: Scene, name: str) -> None:
    """It exits with 0, its workers gone and its home in order, whatever holds on to it."""
    BURDENS.get(name, all_burdens)(at)
    workers = at.workers()
    assert workers
    assert at.daemon.stop() == 0
    at.check_ended(workers)


def test_watchers_get_their_last_bookmark_and_resume_without_a_gap(at: Scene) -> None:
    """Who reads is told where to resume, also beside clients that hold on; there the next daemon goes on."""
    watchers = [Watcher(at.channel(), start) for start in (1, 0)]
    all_burdens(at)
    assert at.daemon.stop() == 0
    for watcher in watchers:
        error = watcher.ended()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert info_of(error).reason == "SHUTTING_DOWN"
        stream = watcher.stream
        assert watcher.messages[-1].HasField("bookmark"), "the last word is a bookmark"
        assert int(info_of(error).metadata["resumeSequence"]) == stream.position + 1
        assert stream.bookmarks[-1].sequence >= stream.events[-1].sequence

    at.hub.clear_faults()
    at.daemon.start()
    resumed = [Watcher(at.channel(), watcher.stream.position + 1) for watcher in watchers]
    with Client(at.daemon.admin) as client:
        client.pull(LARGE)  # joins the download that was under way and goes on by itself
        client.load(MODEL)
    for before, after in zip(watchers, resumed, strict=True):
        wait_until(partial(_told_ready, after), what="the events of the next daemon")
        after.leave()
        validate.check_resumed([before.stream, after.stream])
        assert before.stream.bookmarks[0].store_id == after.stream.bookmarks[0].store_id


def _told_ready(watcher: Watcher) -> bool:
    return any(e.reason == "READY" for m in list(watcher.messages) for e in m.events)


def test_what_is_in_flight_is_answered_while_it_drains() -> None:
    """Watchers have their last word and new calls are refused while a request in flight is still answered."""
    with scene("--set", "shutdown.drain_timeout_s=60") as made:
        at = made.loaded()
        watcher, other = Watcher(at.channel(), 0), at.channel()
        assert health(other) != NOT_SERVING
        call = at.inferring()
        assert at.daemon.process is not None
        at.daemon.process.send_signal(signal.SIGTERM)
        assert info_of(watcher.ended()).reason == "SHUTTING_DOWN"
        assert health(other) == NOT_SERVING
        refused = infer(other).exception(CALL_S)
        assert info_of(refused).reason == "SHUTTING_DOWN"
        assert not call.done()
        at.worker_continued()
        assert list(call.result(CALL_S).raw_output_contents) == [b"four"]
        workers = at.workers()
        assert at.daemon.process.wait(CALL_S) == 0
        at.check_ended(workers)


IDLE = {
    "/modelhost.v1.EventService/WatchStatistics": b"",
    "/modelhost.v1.OperationService/WatchOperation": b"operation",
    "/modelhost.v1.OperationService/WaitOperation": b"operation",
    "/grpc.health.v1.Health/Watch": b"",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": None,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": None,
    "/inference.GRPCInferenceService/ModelStreamInfer": None,
}
"""Calls that only wait: their request, or None for a client that says nothing and stays."""


def test_calls_that_only_wait_do_not_hold_it_up() -> None:
    """Watches, waits and streams without a question end at once, however long the drain may take."""
    with scene("--set", "shutdown.drain_timeout_s=3000") as made:
        at = made.loaded()
        operation = operation_service_pb2.WatchOperationRequest(name=at.downloading())
        silent, channel = threading.Event(), at.channel()
        calls = []
        for path, request in IDLE.items():
            data = operation.SerializeToString() if request else request
            # A message that comes of an iterator is sent by a thread of its own, whenever that is.
            calls.append(
                channel.stream_stream(path)(_silence(silent))
                if data is None
                else channel.unary_stream(path)(data)
            )
        # After them on the same connection: they have come when this is answered.
        assert health(channel) != NOT_SERVING
        assert at.daemon.stop() == 0
        silent.set()
        for path, call in zip(IDLE, calls, strict=True):
            with pytest.raises(grpc.RpcError) as ended:
                list(call)
            assert info_of(ended.value).reason == "SHUTTING_DOWN", path


def _silence(over: threading.Event) -> Iterator[bytes]:
    over.wait(CALL_S * 3)
    yield from ()


def test_what_is_in_flight_beyond_the_deadline_is_told(at: Scene) -> None:
    """A request that its worker does not answer in time is told that the daemon goes, not cut off."""
    call = at.inferring()
    assert at.daemon.stop() == 0
    error = call.exception(CALL_S)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert info_of(error).reason == "SHUTTING_DOWN"


def test_sigint_ends_it_as_sigterm_does(at: Scene) -> None:
    """Ctrl-C ends it in order, too."""
    workers = at.workers()
    assert at.daemon.end(signal.SIGINT) == 0
    at.check_ended(workers)
    assert not os.path.exists(at.daemon.admin.removeprefix("unix:"))
