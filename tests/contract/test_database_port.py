"""What every implementation of the database port does: SQLite's and the fake's."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from modelhostd.adapters.database import SqliteDatabase
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Device,
    DeviceKind,
    Event,
    Instance,
    InstanceState,
    Isolation,
    Kind,
    Lease,
    Model,
    ModelConfig,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
    Requirements,
    Resource,
    Settings,
    Slot,
    Source,
    StoredError,
    Tier,
)
from modelhostd.ports import Batch, Change, Database, RequestRecord, Stored
from tests.fakes.database import FakeDatabase, FakeDisk

MODEL = Model(
    id="minilm",
    uid="0123456789abcdef",
    source=Source("hf://org/minilm", "main", ("*.safetensors",), ("*.bin",)),
    create_time=1_700_000_000.25,
    update_time=1_700_000_001.5,
    display_name="MiniLM \u202e \N{SNOWMAN} \x00 '\"",
    labels={"team": "search"},
    licence="apache-2.0",
    task="feature-extraction",
    config=ModelConfig(
        backend="transformers",
        keep_alive_s=1.5,
        max_batch_size=8,
        isolation=Isolation.PROCESS,
        backend_options={"a": [1, 2.5, None, {"b": True}], "c": "d"},
    ),
    requirements=Requirements(2**40, "8.0", ("accelerate",)),
    pinned=True,
    artifacts=(
        Artifact(1, ArtifactState.AVAILABLE, "a" * 40, 123, 4, 5, 6.0, 7.0),
        Artifact(2, ArtifactState.FAILED, error=StoredError("OFFLINE", "no", {"source": "x"}, 3.0)),
    ),
    edit=7,
)
OPERATION = Operation(
    id="3f0c",
    kind=OperationKind.DOWNLOAD,
    state=OperationState.RUNNING,
    create_time=1.0,
    model="minilm",
    progress=Progress(Phase.DOWNLOADING, 10, 20, 1, 2, 3.5, None, 4, "f", 1),
    result={"bytes": 5, "files": ["a"]},
    principal="uid:1000",
)
INSTANCE = Instance("minilm", "1", 3, "cpu", InstanceState.READY, Tier.DEVICE)
EVERY_KIND: dict[Kind, tuple[str, Resource]] = {
    Kind.MODEL: ("minilm", MODEL),
    Kind.INSTANCE: ("minilm/1", INSTANCE),
    Kind.OPERATION: ("3f0c", OPERATION),
    Kind.DEVICE: ("cpu", Device("cpu", DeviceKind.CPU, "CPU", "cpu", 10, 5)),
    Kind.SLOT: ("image-gen", Slot("image-gen", "minilm", 2.0)),
    Kind.LEASE: ("l", Lease("l", "minilm", "me", 1.0, 2.0)),
    Kind.SETTINGS: ("host", Settings(keep_alive_s=3.0, log_level="debug")),
}

Open = Callable[[], Awaitable[tuple[Database, Stored]]]


@pytest.fixture(params=["sqlite", "fake"])
async def open_database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Yield a function that opens a database on the same disk, closing the one before."""
    disk = FakeDisk()
    opened: list[Database] = []

    async def open_() -> tuple[Database, Stored]:
        if opened:
            await opened.pop().close()
        database: Database = (
            FakeDatabase(disk)
            if request.param == "fake"
            else SqliteDatabase(tmp_path / "modelhost.db")
        )
        stored = await database.open()
        opened.append(database)
        return database, stored

    yield open_
    for database in opened:
        await database.close()


def event(sequence: int, kind: Kind = Kind.MODEL, resource: Resource | None = MODEL) -> Event:
    """Return an event about a resource."""
    return Event(sequence, 1.5, kind, "minilm", resource, "CREATED", {"n": str(sequence)}, "me")


def put(*models: Model, first: int) -> Batch:
    """Return a batch that stores models, one event each."""
    return Batch(
        tuple(Change(Kind.MODEL, model.id, model) for model in models),
        tuple(
            replace(event(number), key=model.id, resource=model)
            for number, model in enumerate(models, start=first)
        ),
    )


async def test_a_new_database_is_empty_and_has_an_identity(open_database: Open) -> None:
    """A new database holds nothing, begins its log at 1 and keeps its store_id."""
    _, stored = await open_database()
    assert (stored.first_sequence, stored.last_sequence) == (1, 0)
    assert stored.requests == ()
    assert {kind: dict(rows) for kind, rows in stored.resources.items()} == {
        kind: {} for kind in Kind
    }
    _, again = await open_database()
    assert again.store_id == stored.store_id
    assert len(stored.store_id) == 36


async def test_every_kind_comes_back_equal_from_the_log(open_database: Open) -> None:
    """Each resource, with every field set, is the same value after its way through the log."""
    database, _ = await open_database()
    events = tuple(
        Event(number, 2.5, kind, key, resource, "WHY", {"a": "b"}, "me", created=number % 2 == 0)
        for number, (kind, (key, resource)) in enumerate(EVERY_KIND.items(), start=1)
    )
    await database.commit(Batch((), events))
    assert tuple(await database.read_events(1, 256)) == events


async def test_every_kind_comes_back_equal_from_its_row(open_database: Open) -> None:
    """After a restart every row is the value that was committed last."""
    database, _ = await open_database()
    changes = tuple(Change(kind, key, value) for kind, (key, value) in EVERY_KIND.items())
    await database.commit(Batch(changes, ()))
    _, stored = await open_database()
    assert stored.resources == {kind: dict([EVERY_KIND[kind]]) for kind in Kind}


async def test_rows_keep_the_order_in_which_they_first_came(open_database: Open) -> None:
    """A changed row keeps its place, a deleted and new one goes to the end."""
    database, _ = await open_database()
    b, a, c = (replace(MODEL, id=name) for name in "bac")
    await database.commit(put(b, a, c, first=1))
    await database.commit(put(replace(b, edit=8), first=4))
    await database.commit(Batch((Change(Kind.MODEL, "a", None),), (event(5, resource=None),)))
    await database.commit(put(a, first=6))
    _, stored = await open_database()
    assert list(stored.resources[Kind.MODEL]) == ["b", "c", "a"]
    assert stored.resources[Kind.MODEL]["b"] == replace(b, edit=8)


async def test_an_event_of_something_gone_has_no_resource(open_database: Open) -> None:
    """A deletion is an event without a resource, with reason, details and principal."""
    database, _ = await open_database()
    await database.commit(Batch((), (event(1, resource=None),)))
    assert list(await database.read_events(0, 10)) == [event(1, resource=None)]


async def test_events_are_read_in_pages_of_at_most_256(open_database: Open) -> None:
    """Pages come in order from the sequence asked for; no page has more than 256 events."""
    database, _ = await open_database()
    await database.commit(Batch((), tuple(event(n) for n in range(1, 601))))
    sizes, start = [], 1
    while page := await database.read_events(start, 1000):
        assert [e.sequence for e in page] == list(range(start, start + len(page)))
        sizes.append(len(page))
        start += len(page)
    assert sizes == [256, 256, 88]
    assert [e.sequence for e in await database.read_events(300, 2)] == [300, 301]
    assert await database.read_events(601, 10) == []
    assert await database.read_events(1, 0) == []


async def test_the_log_goes_on_after_a_restart(open_database: Open) -> None:
    """Sequences continue where they ended, and what was written is still readable."""
    database, _ = await open_database()
    await database.commit(Batch((), (event(1), event(2))))
    database, stored = await open_database()
    assert (stored.first_sequence, stored.last_sequence) == (1, 2)
    await database.commit(Batch((), (event(3),)))
    assert [e.sequence for e in await database.read_events(1, 10)] == [1, 2, 3]


@pytest.mark.parametrize("sequences", [(2,), (0,), (1, 3), (1, 1)], ids=str)
async def test_events_that_leave_a_gap_are_refused(
    open_database: Open, sequences: tuple[int, ...]
) -> None:
    """A batch that does not continue the log stores nothing and says what was expected."""
    database, _ = await open_database()
    batch = Batch((Change(Kind.MODEL, "minilm", MODEL),), tuple(event(n) for n in sequences))
    with pytest.raises(ModelhostError) as caught:
        await database.commit(batch)
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert caught.value.metadata["cause"] == "sequence"
    _, stored = await open_database()
    assert not stored.resources[Kind.MODEL]
    assert stored.last_sequence == 0


async def test_compaction_moves_the_first_sequence(open_database: Open) -> None:
    """Events below the compaction point are gone; the rest and the numbering stay."""
    database, _ = await open_database()
    await database.commit(Batch((), tuple(event(n) for n in range(1, 11))))
    await database.commit(Batch((), (event(11),), compact_before=8))
    assert [e.sequence for e in await database.read_events(0, 256)] == [8, 9, 10, 11]
    _, stored = await open_database()
    assert (stored.first_sequence, stored.last_sequence) == (8, 11)


async def test_a_number_is_never_used_again(open_database: Open) -> None:
    """When the whole log was compacted away, the next event still gets the next number."""
    database, _ = await open_database()
    await database.commit(Batch((), (event(1), event(2))))
    await database.commit(Batch((), (), compact_before=3))
    database, stored = await open_database()
    assert (stored.first_sequence, stored.last_sequence) == (3, 2)
    await database.commit(Batch((), (), compact_before=3))
    await database.commit(Batch((), (event(3),)))
    assert [e.sequence for e in await database.read_events(0, 10)] == [3]


async def test_requests_come_back_in_order(open_database: Open) -> None:
    """Answers to request ids survive, the newest last; a repeated id replaces its record."""
    database, _ = await open_database()
    records = [RequestRecord(f"r{n}", f"f{n}", f"models/m{n}", float(n)) for n in range(3)]
    await database.commit(Batch((), (), tuple(records)))
    newer = replace(records[0], answer="operations/x")
    await database.commit(Batch((), (), (newer,)))
    _, stored = await open_database()
    assert list(stored.requests) == [records[1], records[2], newer]


async def test_commits_are_stored_in_the_order_of_their_calls(open_database: Open) -> None:
    """Commits started together happen one after the other, none overtakes."""
    database, _ = await open_database()
    batches = [put(replace(MODEL, edit=n), first=n) for n in range(1, 101)]
    await asyncio.gather(*(database.commit(batch) for batch in batches))
    _, stored = await open_database()
    assert stored.last_sequence == 100
    assert stored.resources[Kind.MODEL]["minilm"] == replace(MODEL, edit=100)


async def test_a_commit_whose_caller_goes_away_still_happens(open_database: Open) -> None:
    """Cancelling a waiting commit leaves no gap: it is stored, and so is the next."""
    database, _ = await open_database()
    first = asyncio.create_task(database.commit(put(MODEL, first=1)))
    await asyncio.sleep(0)
    first.cancel()
    await database.commit(put(replace(MODEL, edit=8), first=2))
    assert first.cancelled()
    assert [e.sequence for e in await database.read_events(1, 10)] == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        replace(MODEL, update_time=float("nan")),
        replace(MODEL, labels={"a": 1}),  # type: ignore[dict-item]
        replace(MODEL, display_name="\udcff"),
        replace(MODEL, config=ModelConfig(backend_options={"a": object()})),
        replace(MODEL, artifacts=(Artifact(1, "SOMEWHERE"),)),  # type: ignore[arg-type]
        INSTANCE,
    ],
    ids=["nan", "number as text", "surrogate", "object", "unknown state", "wrong kind"],
)
async def test_what_could_not_be_read_back_is_not_stored(
    open_database: Open, bad: Resource
) -> None:
    """A value that JSON cannot hold fails its own commit, and the next one works."""
    database, _ = await open_database()
    batch = put(MODEL, first=1)
    with pytest.raises(ModelhostError) as caught:
        await database.commit(
            replace(batch, changes=(*batch.changes, Change(Kind.MODEL, "x", bad)))
        )
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert caught.value.metadata["cause"] == "encoding"
    await database.commit(batch)
    _, stored = await open_database()
    assert list(stored.resources[Kind.MODEL]) == ["minilm"]


async def test_a_read_only_mapping_is_stored_as_its_content(open_database: Open) -> None:
    """Any Mapping is stored as what it holds."""
    database, _ = await open_database()
    model = replace(MODEL, labels=MappingProxyType({"a": "b"}))
    await database.commit(put(model, first=1))
    _, stored = await open_database()
    assert stored.resources[Kind.MODEL]["minilm"] == replace(MODEL, labels={"a": "b"})


async def test_an_empty_batch_is_nothing(open_database: Open) -> None:
    """A batch with nothing in it succeeds and changes nothing."""
    database, _ = await open_database()
    await database.commit(Batch((), ()))
    _, stored = await open_database()
    assert stored.last_sequence == 0


async def test_after_close_every_call_is_refused(open_database: Open) -> None:
    """A closed database refuses commits and reads with a typed error; closing again is nothing."""
    database, _ = await open_database()
    await database.close()
    await database.close()
    for call in (database.commit(put(MODEL, first=1)), database.read_events(1, 1)):
        with pytest.raises(ModelhostError) as caught:
            await call
        assert caught.value.reason is Reason.STORAGE_ERROR


async def test_close_waits_for_the_commits_asked_for(open_database: Open) -> None:
    """What was asked for before close is stored when close returns."""
    database, _ = await open_database()
    commits = [asyncio.create_task(database.commit(Batch((), (event(n),)))) for n in range(1, 51)]
    await asyncio.sleep(0)
    await database.close()
    await asyncio.gather(*commits)
    _, stored = await open_database()
    assert stored.last_sequence == 50
