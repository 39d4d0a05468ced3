"""ListEvents: pages of history."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from modelhost.v1 import event_service_pb2, events_pb2
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from modelhostd.api import events as events_module
from modelhostd.host.registry import History
from tests import event_validators as validate
from tests.api.event_scene import Scene, scene
from tests.api.serving import info_of
from tests.host.support import World

Answer = event_service_pb2.ListEventsResponse


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def page(at: Scene, **request: Any) -> Answer:
    stub = EventServiceStub(at.channel)
    return await stub.ListEvents(event_service_pb2.ListEventsRequest(**request))


async def pages(at: Scene, **request: Any) -> AsyncIterator[Answer]:
    """Yield every page of a list."""
    token = ""
    while True:
        answer = await page(at, page_token=token, **request)
        yield answer
        token = answer.next_page_token
        if not token:
            return


async def refused(at: Scene, **request: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await page(at, **request)
    return caught.value


async def test_pages_hold_all_of_history_once(world: World) -> None:
    """Pages of any size join to the whole, and each says where history begins and ends."""
    async with scene(world) as at:
        await at.publish(300)
        joined: list[events_pb2.Event] = []
        async for answer in pages(at, page_size=7):
            assert len(answer.events) <= 7
            assert (answer.sequence, answer.first_sequence) == (at.last, 1)
            assert answer.store_id == world.disk.store_id
            joined.extend(answer.events)
        validate.check_contiguous(joined, 1, at.last)
        watched = await at.watch(start_sequence=1).until(at.last)
        validate.check_same(watched.events, joined)


async def test_a_range_is_inclusive_at_both_ends(world: World) -> None:
    """From 5 to 9 are five events; from beyond the end are none."""
    async with scene(world) as at:
        await at.publish(20)
        answer = await page(at, start_sequence=5, end_sequence=9)
        validate.check_contiguous(answer.events, 5, 9)
        assert not answer.next_page_token
        assert not (await page(at, start_sequence=at.last + 1)).events
        assert not (await page(at, start_sequence=at.last + 1000)).events
        assert len((await page(at, start_sequence=at.last)).events) == 1


async def test_a_filter_applies_before_the_page_is_cut(world: World) -> None:
    """Pages of a filtered list are full of events that pass."""
    async with scene(world) as at:
        await at.publish(30, "a")
        await at.publish(30, "b")
        wanted = events_pb2.EventFilter(models=["models/b"])
        joined: list[events_pb2.Event] = []
        async for answer in pages(at, page_size=10, filter=wanted):
            joined.extend(answer.events)
        everything = await page(at, page_size=1000)
        validate.check_filtered(everything.events, joined, wanted)
        assert len(joined) == 31


async def test_a_page_looks_at_a_bounded_part_of_history(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter that lets nothing pass gets empty pages with a token, not one scan of everything."""
    monkeypatch.setattr(events_module, "PAGE_SCAN_MAX", 100)
    async with scene(world) as at:
        await at.publish(350)
        wanted = events_pb2.EventFilter(reasons=["NEVER"])
        answers = [a async for a in pages(at, filter=wanted)]
        assert len(answers) == at.last // 100 + 1
        assert not any(a.events for a in answers)
        assert at.service.figures.events_encoded == 0


async def test_a_page_is_cut_before_it_grows_too_large_to_send(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand large events come in more pages than asked for, each of a size that can be sent."""
    monkeypatch.setattr(events_module, "PAGE_BYTES_MAX", 50_000)
    async with scene(world) as at:
        await at.publish(60, padding=5000)
        joined: list[events_pb2.Event] = []
        async for answer in pages(at, page_size=1000):
            assert answer.ByteSize() < 60_000
            joined.extend(answer.events)
        validate.check_contiguous(joined, 1, at.last)


async def test_compacted_history_is_refused_and_0_means_what_is_left(world: World) -> None:
    """A start that is gone is SEQUENCE_COMPACTED, also for a token whose place has gone meanwhile."""
    async with scene(world, history=History(count=100)) as at:
        await at.publish(20)
        token = (await page(at, page_size=5)).next_page_token
        await at.publish(1200)
        await at.publish(1)
        for request in ({"start_sequence": 1}, {"page_size": 5, "page_token": token}):
            error = await refused(at, **request)
            assert error.code() is grpc.StatusCode.OUT_OF_RANGE
            assert info_of(error).reason == "SEQUENCE_COMPACTED"
        answer = await page(at, page_size=1000)
        assert answer.first_sequence > 1
        validate.check_contiguous(answer.events, answer.first_sequence, at.last)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        pytest.param({"start_sequence": -1}, "start_sequence", id="negative-start"),
        pytest.param({"end_sequence": -1}, "end_sequence", id="negative-end"),
        pytest.param({"page_size": -1}, "page_size", id="negative-size"),
        pytest.param({"page_token": "@@@"}, "page_token", id="garbage-token"),
        pytest.param({"page_token": "AAAAAAAAAAAAAAAA"}, "page_token", id="forged-token"),
        pytest.param({"filter": {"kinds": [42]}}, "filter.kinds[0]", id="unknown-kind"),
    ],
)
async def test_a_bad_request_is_refused_by_field(
    world: World, request_: dict[str, object], field: str
) -> None:
    """What cannot be listed is INVALID_ARGUMENT, and the field is named."""
    async with scene(world) as at:
        error = await refused(at, **request_)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert info_of(error).metadata["field"] == field


async def test_a_token_belongs_to_its_query(world: World) -> None:
    """A token with another filter or range is INVALID_ARGUMENT; with another page size it is fine."""
    async with scene(world) as at:
        await at.publish(20)
        token = (await page(at, page_size=5)).next_page_token
        other = await refused(
            at, page_token=token, filter=events_pb2.EventFilter(models=["models/m"])
        )
        assert info_of(other).metadata["field"] == "page_token"
        assert info_of(await refused(at, page_token=token, start_sequence=2)).reason
        assert (await page(at, page_token=token, page_size=2)).events[0].sequence == 6
