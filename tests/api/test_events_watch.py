"""WatchEvents over a real socket: order, resumption, snapshots, bookmarks and ends."""

import asyncio
from pathlib import Path

import grpc
import pytest

from modelhost.v1 import event_service_pb2, events_pb2
from modelhostd.api.event_batches import MESSAGE_BYTES_MAX
from modelhostd.core.resources import Phase, Progress
from modelhostd.host.registry import History
from tests import event_validators as validate
from tests.api.event_scene import scene
from tests.api.serving import info_of
from tests.host.support import World
from tests.support import DEADLINE_S, wait_until_async


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_from_now_on_means_what_comes_after_the_opening_bookmark(world: World) -> None:
    """Start 0 sends a bookmark of the present, then each new event with its resource, and no old one."""
    async with scene(world) as at:
        before = at.last
        watch = at.watch()
        assert (await watch.opened()).bookmarks[0].sequence == before
        assert watch.stream.bookmarks[0].store_id == world.disk.store_id
        await at.run.add("minilm")
        stream = await watch.until(before + 1)
        (event,) = stream.events
        assert (event.sequence, event.name) == (before + 1, "models/minilm")
        assert (event.change, event.reason) == (events_pb2.Event.CREATED, "CREATED")
        assert event.resource.model.source.uri == "hf://org/minilm"


async def test_a_start_is_sent_from_there_and_goes_on_live(world: World) -> None:
    """Start N sends N and everything after it, whether it lies in the past or is still to come."""
    async with scene(world) as at:
        await at.run.have("minilm")
        past = at.watch(start_sequence=1)
        next_one = at.watch(start_sequence=at.last + 1)
        await past.until(at.last)
        await next_one.opened()
        await at.run.load("minilm")
        validate.check_contiguous((await past.until(at.last)).events, 1, at.last)
        first = next_one.stream.bookmarks[0].sequence + 1
        stream = await next_one.until(at.last)
        validate.check_contiguous(stream.events, first, at.last)
        validate.check_same(past.stream.events, stream.events)


async def test_a_broken_stream_resumes_without_gap_or_repeat(world: World) -> None:
    """Each connection that starts one after the last sequence seen joins the one before it."""
    async with scene(world) as at:
        streams = []
        start = 1
        for _ in range(4):
            await at.publish(30, padding=500)
            watch = at.watch(start_sequence=start)
            await watch.opened()
            await watch.next()
            watch.call.cancel()
            streams.append(watch.stream)
            start = watch.stream.position + 1
        joined = validate.check_resumed(streams)
        assert joined[0].sequence == 1
        await wait_until_async(lambda: at.service.watcher_count == 0)


async def test_events_are_the_same_after_a_restart(world: World) -> None:
    """History read from the database tells each event exactly as it was told live."""
    async with scene(world) as at:
        live = at.watch(start_sequence=1)
        await at.run.have("minilm")
        await at.run.load("minilm")
        before = await live.until(at.last)
    async with scene(world) as at:
        after = await at.watch(start_sequence=1).until(at.last)
        validate.check_contiguous(after.events, 1, at.last)
        validate.check_same(before.events, after.events)


async def test_a_snapshot_and_what_follows_are_the_state(world: World) -> None:
    """Whoever applies the events after a snapshot holds the committed state, nothing more or less."""
    async with scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        watch = at.watch(include_snapshot=True)
        opened = await watch.opened()
        assert opened.snapshot == at.truth
        assert opened.snapshot_sequence == at.last
        await at.run.have("b")
        await at.run.load("b")
        await at.run.end(await at.run.host.residency.unload("a"))
        await at.run.end(await at.run.host.models.delete("a", force=True))
        stream = await watch.until(at.last)
        validate.check_contiguous(stream.events, stream.snapshot_sequence + 1, at.last)
        validate.check_state(stream, at.truth)


async def test_a_snapshot_is_of_one_moment_however_slowly_it_is_read(world: World) -> None:
    """Changes between the chunks of a snapshot are not in it; they come as events after it."""
    async with scene(world) as at:
        for number in range(40):
            await at.publish(1, f"m{number}", padding=8000)
        before, taken = at.last, at.truth
        watch = at.watch(include_snapshot=True)
        first = await watch.next()
        assert first.HasField("snapshot")
        for number in range(40):
            await at.publish(1, f"m{number}", padding=10)
        stream = await watch.until(at.last)
        assert stream.snapshot == taken
        assert stream.snapshot_sequence == before
        validate.check_contiguous(stream.events, before + 1, at.last)
        validate.check_state(stream, at.truth)


async def test_messages_are_small_unless_one_resource_is_large(world: World) -> None:
    """Events and snapshots come in messages of a bounded size; what is larger alone comes alone."""
    async with scene(world) as at:
        await at.publish(50, "small", padding=3000)
        last = await at.publish(2, "large", padding=2 * MESSAGE_BYTES_MAX)
        watch = at.watch(start_sequence=1)
        await watch.until(last)
        snapshot = at.watch(include_snapshot=True)
        await snapshot.opened()
        for message in watch.messages:
            assert message.ByteSize() <= MESSAGE_BYTES_MAX or len(message.events) == 1
        for message in snapshot.messages:
            assert (
                message.ByteSize() <= MESSAGE_BYTES_MAX + 16 or len(message.snapshot.resources) == 1
            )
        assert max(m.ByteSize() for m in watch.messages) > 2 * MESSAGE_BYTES_MAX


async def test_bookmarks_come_while_nothing_else_does(world: World) -> None:
    """An idle stream, and one whose filter lets nothing pass, say again and again how far they are."""
    async with scene(world, bookmark_s=0.05) as at:
        idle = at.watch()
        nothing = at.watch(filter=events_pb2.EventFilter(reasons=["NEVER"]))
        await idle.opened()
        await nothing.opened()
        last = await at.publish(5)
        for watch in (idle, nothing):
            await watch.until(last)
            assert (await watch.next()).bookmark.sequence == last
        assert not nothing.stream.events


async def test_draining_ends_each_stream_with_the_sequence_to_resume_from(world: World) -> None:
    """When the daemon stops, a last bookmark comes, then SHUTTING_DOWN with where to go on."""
    async with scene(world) as at:
        watch = at.watch()
        await watch.opened()
        last = await at.publish(3)
        await watch.until(last)
        at.serving.calls.draining.set()
        error = await watch.fail()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        info = info_of(error)
        assert info.reason == "SHUTTING_DOWN"
        assert watch.messages[-1].bookmark.sequence == last
        assert int(info.metadata["resumeSequence"]) == last + 1
        assert await at.serving.calls.wait_idle(DEADLINE_S)
    async with scene(world) as at:
        again = at.watch(start_sequence=int(info.metadata["resumeSequence"]))
        await at.publish(3)
        validate.check_resumed([watch.stream, await again.until(at.last)])


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        pytest.param({"start_sequence": -1}, "start_sequence", id="negative"),
        pytest.param(
            {"start_sequence": 1, "include_snapshot": True},
            "start_sequence",
            id="start-and-snapshot",
        ),
        pytest.param({"filter": {"kinds": [0]}}, "filter.kinds[0]", id="kind-unspecified"),
        pytest.param({"filter": {"kinds": [99]}}, "filter.kinds[0]", id="kind-unknown"),
        pytest.param({"filter": {"names": [""]}}, "filter.names[0]", id="name-empty"),
        pytest.param({"filter": {"names": ["models/../x"]}}, "filter.names[0]", id="name-dots"),
        pytest.param({"filter": {"models": ["minilm"]}}, "filter.models[0]", id="bare-id"),
        pytest.param({"filter": {"reasons": [""]}}, "filter.reasons[0]", id="reason-empty"),
        pytest.param({"filter": {"reasons": ["X"] * 101}}, "filter.reasons", id="too-many"),
    ],
)
async def test_a_bad_request_is_refused_by_field(
    world: World, request_: dict[str, object], field: str
) -> None:
    """What cannot be watched is INVALID_ARGUMENT, and the field is named."""
    async with scene(world) as at:
        error = await at.watch(**request_).fail()
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert info_of(error).metadata["field"] == field


async def test_what_has_not_happened_is_refused_with_what_has(world: World) -> None:
    """A start beyond the next sequence is SEQUENCE_IN_FUTURE: it comes from another store."""
    async with scene(world) as at:
        error = await at.watch(start_sequence=at.last + 2).fail()
        assert error.code() is grpc.StatusCode.OUT_OF_RANGE
        info = info_of(error)
        assert info.reason == "SEQUENCE_IN_FUTURE"
        assert int(info.metadata["currentSequence"]) == at.last


async def test_history_that_is_gone_is_refused_with_what_is_left(world: World) -> None:
    """A start before the oldest event is SEQUENCE_COMPACTED with the first that can still be had."""
    async with scene(world, history=History(count=100)) as at:
        await at.publish(1200)
        await at.publish(1)
        info = info_of(await at.watch(start_sequence=1).fail())
        assert info.reason == "SEQUENCE_COMPACTED"
        first = int(info.metadata["firstSequence"])
        assert first > 1
        stream = await at.watch(start_sequence=first).until(at.last)
        validate.check_contiguous(stream.events, first, at.last)


async def test_a_reader_that_history_overtakes_is_told(world: World) -> None:
    """A reader so slow that its place is compacted gets what was under way, then SEQUENCE_COMPACTED."""
    async with scene(world, history=History(count=100, ring=50)) as at:
        await at.publish(300, padding=2000)
        watch = at.watch(start_sequence=1)
        await watch.next()
        await at.publish(1000)
        await at.publish(1)
        error = await watch.fail()
        info = info_of(error)
        assert info.reason == "SEQUENCE_COMPACTED"
        # On a busy machine history may overtake it before its first event.
        events = watch.stream.events
        last = events[-1].sequence if events else 0
        if events:
            validate.check_contiguous(events, 1, last)
        assert int(info.metadata["startSequence"]) == last + 1


async def test_progress_is_sampled_only_where_it_is_asked_for(world: World) -> None:
    """Samples are the latest of each operation, come after its event, and never without being asked."""
    async with scene(world) as at:
        world.downloads.add("hf://org/a", {"config.json": b"{}", "model.safetensors": b"w" * 4096})
        hold = world.downloads.hold("hf://org/a")
        plain = at.watch(include_snapshot=True)
        sampled = at.watch(include_snapshot=True, include_progress=True)
        await plain.opened()
        await sampled.opened()
        await at.run.add("a", 4096)
        operation = await at.run.host.transfers.download("a")
        await hold.reached.wait()
        while not sampled.stream.samples:
            await sampled.next()
        for done in range(100):
            at.run.host.operations.report(
                operation.id, Progress(Phase.DOWNLOADING, done_bytes=1000 + done)
            )
        while sampled.stream.samples[-1].progress.done_bytes != 1099:
            await sampled.next()
        hold.release()
        await at.run.end(operation)
        stream = await sampled.until(at.last)
        assert len(stream.samples) < 20
        assert {s.operation for s in stream.samples} == {f"operations/{operation.id}"}
        assert {s.model for s in stream.samples} == {"models/a"}
        known: set[str] = set()
        for message in sampled.messages:
            known |= {e.name for e in message.events}
            assert all(s.operation in known for s in message.progress_samples)
        assert not (await plain.until(at.last)).samples
        validate.check_state(stream, at.truth)


async def test_a_late_watcher_is_told_at_once_how_far_everything_is(world: World) -> None:
    """The latest sample of each unfinished operation comes right after the snapshot."""
    async with scene(world) as at:
        world.downloads.add("hf://org/a", {"config.json": b"{}", "model.safetensors": b"w" * 4096})
        hold = world.downloads.hold("hf://org/a")
        await at.run.add("a", 4096)
        operation = await at.run.host.transfers.download("a")
        await hold.reached.wait()
        watch = at.watch(include_snapshot=True, include_progress=True)
        while not watch.messages or not watch.messages[-1].progress_samples:
            await watch.next()
        (sample,) = watch.stream.samples
        assert sample.operation == f"operations/{operation.id}"
        assert sample.progress.total_bytes > 0
        hold.release()
        await at.run.end(operation)


async def test_too_many_streams_are_refused_and_the_rest_goes_on(world: World) -> None:
    """Above its limit a stream is QUEUE_FULL with a delay; one that closes makes room."""
    async with scene(world, watchers_max=2) as at:
        first, second = at.watch(), at.watch()
        await first.opened()
        await second.opened()
        error = await at.watch().fail()
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert info_of(error).reason == "QUEUE_FULL"
        first.call.cancel()
        await wait_until_async(lambda: at.service.watcher_count == 1)
        third = at.watch()
        await third.opened()
        last = await at.publish(1)
        await third.until(last)
        await second.until(last)


async def test_a_stream_that_is_cancelled_leaves_nothing(world: World) -> None:
    """A hundred streams that come and go leave no watcher, no task and no waiter behind."""
    async with scene(world) as at:
        before = len(asyncio.all_tasks())
        for _ in range(100):
            watch = at.watch(include_snapshot=True, include_progress=True)
            await watch.next()
            watch.call.cancel()
        await wait_until_async(lambda: at.service.watcher_count == 0)
        assert await at.serving.calls.wait_idle(DEADLINE_S)
        await wait_until_async(lambda: len(asyncio.all_tasks()) <= before + 2)
        assert at.run.host.registry.journal.changed.waiter_count == 0


def test_the_wire_is_built_from_the_fields_it_says() -> None:
    """Entries are joined by hand, so events must stay field 1 of both messages that carry them."""
    watched = event_service_pb2.WatchEventsResponse.DESCRIPTOR.fields_by_name["events"]
    listed = event_service_pb2.ListEventsResponse.DESCRIPTOR.fields_by_name["events"]
    assert watched.number == listed.number == 1
