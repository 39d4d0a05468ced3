"""Which artifacts leave the disk: properties over random artifacts that share blobs."""

from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Instance,
    InstanceState,
    Kind,
    Lease,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Slot,
    Source,
    Tier,
)
from modelhostd.core.state import State
from modelhostd.core.storage import (
    POLICIES,
    Shares,
    StoredArtifact,
    clearance,
    kept_by,
    last_use,
    stored_artifacts,
)

NOW, TTL_S = 1000.0, 300.0
SIZES = dict(zip("abcdefgh", (1, 2, 4, 8, 8, 16, 50, 100), strict=True))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Sequence[StoredArtifact], Collection[str]]:
    """Artifacts of a few models over a few blobs, and the digests that downloads count on."""
    count = draw(st.integers(0, 7))
    stored = [
        StoredArtifact(
            f"m{number // 2}",
            number % 2 + 1,
            draw(st.integers(0, 1000)),
            {blob: SIZES[blob] for blob in draw(st.sets(st.sampled_from(sorted(SIZES))))},
            draw(st.sampled_from(["", "", "", "LOADED", "PINNED", "LEASED", "SLOT", "BUSY"])),
        )
        for number in range(count)
    ]
    return stored, draw(st.sets(st.sampled_from(sorted(SIZES)), max_size=2))


def really_freed(
    stored: Sequence[StoredArtifact], held: Collection[str], going: Sequence[StoredArtifact]
) -> int:
    """What is gone from disk, blob by blob: of those that nobody has any more."""
    stay = {d for a in stored if a not in going for d in a.blobs} | set(held)
    return sum(SIZES[d] for d in {d for a in going for d in a.blobs} - stay)


def chosen(
    world: tuple[Sequence[StoredArtifact], Collection[str]], policy: str, needed: int
) -> Sequence[StoredArtifact]:
    """Decide, and hold what is said of bytes against the count blob by blob."""
    stored, held = world
    found = clearance(stored, held, policy, needed_bytes=needed, now=NOW, ttl_s=TTL_S)
    assert found.freed_bytes == really_freed(stored, held, found.victims)
    assert len(found.freed) == len(found.victims) == len({id(a) for a in found.victims})
    assert all(not a.kept_by for a in found.victims)
    return found.victims


@given(worlds(), st.sampled_from(POLICIES), st.integers(-5, 200))
def test_nothing_that_is_kept_goes_and_bytes_are_those_nobody_needs(
    world: tuple[Sequence[StoredArtifact], Collection[str]], policy: str, needed: int
) -> None:
    """Whatever the policy: a loaded, pinned, leased, slot-active or busy one stays, sums are true."""
    victims = chosen(world, policy, needed)
    assert policy != "off" or not victims


@given(worlds(), st.sampled_from(["lru", "size"]), st.integers(1, 200))
def test_room_is_made_with_no_victim_too_many_or_not_at_all(
    world: tuple[Sequence[StoredArtifact], Collection[str]], policy: str, needed: int
) -> None:
    """Enough is freed, no victim could stay; nothing goes where all of it would not suffice."""
    stored, held = world
    victims = chosen(world, policy, needed)
    if not victims:
        may_go = [a for a in stored if not a.kept_by]
        assert really_freed(stored, held, may_go) < needed
        return
    assert really_freed(stored, held, victims) >= needed
    for victim in victims:
        without = [a for a in victims if a is not victim]
        assert really_freed(stored, held, without) < needed


@given(worlds(), st.integers(1, 200))
def test_lru_takes_from_the_oldest_on(
    world: tuple[Sequence[StoredArtifact], Collection[str]], needed: int
) -> None:
    """The victims are among the least recently used that suffice together."""
    stored, held = world
    victims = chosen(world, "lru", needed)
    order = sorted(
        (a for a in stored if not a.kept_by), key=lambda a: (a.last_use, a.model, a.version)
    )
    prefix: list[StoredArtifact] = []
    while victims and really_freed(stored, held, prefix) < needed:
        prefix.append(order[len(prefix)])
    assert {id(a) for a in victims} <= {id(a) for a in prefix}


@given(worlds(), st.integers(0, 200))
def test_ttl_takes_what_is_past_its_time_and_nothing_else(
    world: tuple[Sequence[StoredArtifact], Collection[str]], needed: int
) -> None:
    """Whether or not room is needed."""
    victims = chosen(world, "ttl", needed)
    expired = [a for a in world[0] if not a.kept_by and NOW - a.last_use >= TTL_S]
    assert {id(a) for a in victims} == {id(a) for a in expired}


def test_size_takes_one_large_one_rather_than_many_small() -> None:
    """The largest that may go, of two equal ones the one used longer ago."""
    small = [StoredArtifact(f"s{n}", 1, n, {f"s{n}": 5}) for n in range(4)]
    large = [StoredArtifact("l1", 1, 90.0, {"x": 20}), StoredArtifact("l2", 1, 80.0, {"y": 20})]
    found = clearance([*small, *large], (), "size", needed_bytes=12, now=NOW, ttl_s=TTL_S)
    assert [v.model for v in found.victims] == ["l2"]


def test_shared_bytes_are_counted_once_and_only_between_models() -> None:
    """Two versions of one model that share a blob are no sharing between models."""
    stored = [
        StoredArtifact("a", 1, 0.0, {"x": 5, "own": 3}),
        StoredArtifact("a", 2, 0.0, {"x": 5, "y": 7}),
        StoredArtifact("b", 1, 0.0, {"y": 7}),
    ]
    shares = Shares(stored)
    assert shares.shared_bytes == 7
    assert shares.freed(stored[:2]) == 8
    assert shares.freed(stored) == 15


def model(key: str, *times: float, pinned: bool = False, chosen_version: int = 0) -> Model:
    """Return a model with an AVAILABLE artifact for each time."""
    artifacts = tuple(
        Artifact(n, ArtifactState.AVAILABLE, available_time=time) for n, time in enumerate(times, 1)
    )
    return Model(
        key, "uid", Source("hf://o/m"), 0.0, 0.0,
        artifacts=artifacts, pinned=pinned, last_version=len(times), chosen_version=chosen_version,
    )  # fmt: skip


def test_the_spare_version_was_last_of_use_when_its_successor_came() -> None:
    """The version that loads take has the model's last use; one that was rolled back from its arrival."""
    two = model("m", 10.0, 20.0)
    assert [last_use(two, a, 500.0) for a in two.artifacts] == [20.0, 500.0]
    assert [last_use(two, a, 0.0) for a in two.artifacts] == [20.0, 20.0]
    back = model("m", 10.0, 20.0, chosen_version=1)
    assert [last_use(back, a, 500.0) for a in back.artifacts] == [500.0, 20.0]


@pytest.mark.parametrize("state", list(InstanceState))
def test_an_instance_keeps_its_model_unless_it_holds_nothing(state: InstanceState) -> None:
    """Loaded, loading, draining and warm are in use; FAILED and BLOCKED are what is left of a load."""
    held = Instance("m", "1", 1, "cpu", state, Tier.DISK)
    found = kept_by(State({Kind.INSTANCE: {"m/1": held}}))
    empty = state in (InstanceState.FAILED, InstanceState.BLOCKED)
    assert found == ({} if empty else {"m": "LOADED"})


def test_what_keeps_a_model() -> None:
    """Pin, lease, slot, unfinished operation: each by itself; an operation that has ended does not."""

    def operation(key: str, state: OperationState) -> Operation:
        return Operation(key, OperationKind.DOWNLOAD, state, 0.0, model=key)

    state = State(
        {
            Kind.MODEL: {
                key: model(key, 1.0, pinned=key == "pinned") for key in ("pinned", "free")
            },
            Kind.LEASE: {"l": Lease("l", "leased", "", 0.0, 9.0)},
            Kind.SLOT: {"s": Slot("s", "in-slot", 0.0)},
            Kind.OPERATION: {
                "busy": operation("busy", OperationState.PAUSED),
                "free": operation("free", OperationState.FAILED),
            },
        }
    )
    kept = {"pinned": "PINNED", "leased": "LEASED", "in-slot": "SLOT", "busy": "BUSY"}
    assert kept_by(state) == kept
    blobs = {("free", 1): {"x": 1}, ("pinned", 1): {"x": 1}, ("gone", 3): {"y": 1}, ("free", 2): {}}
    found = stored_artifacts(state, blobs, {"free": 7.0}, kept)
    assert [(a.model, a.version, a.last_use, a.kept_by) for a in found] == [
        ("free", 1, 7.0, ""),
        ("pinned", 1, 1.0, "PINNED"),
        ("gone", 3, 0.0, "BUSY"),
        ("free", 2, 0.0, "BUSY"),
    ]
