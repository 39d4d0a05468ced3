"""Which artifacts leave the disk by themselves, and what that frees. Pure.

A blob that several artifacts have is freed when the last of them goes: bytes are counted for victims
together, never one by one.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from modelhostd.core.resources import (
    FINAL_STATES,
    Artifact,
    ArtifactState,
    InstanceState,
    Model,
)
from modelhostd.core.state import State
from modelhostd.core.uploads import UPLOAD
from modelhostd.core.values import dataclass

POLICIES = ("off", "lru", "size", "ttl")
"""``lru`` and ``size`` make room that is needed, ``ttl`` takes what was not used for a time."""


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """An artifact on disk. ``last_use``: seconds since the epoch. ``blobs``: SHA-256 -> bytes.

    ``kept_by`` says in one word why it may not go; empty = it may.
    """

    model: str
    version: int
    last_use: float
    blobs: Mapping[str, int]
    kept_by: str = ""


@dataclass(frozen=True, slots=True)
class Clearance:
    """What goes, in this order, and the bytes that each frees once those before it are gone."""

    victims: Sequence[StoredArtifact] = ()
    freed: Sequence[int] = ()

    @property
    def freed_bytes(self) -> int:
        """What all of them free together."""
        return sum(self.freed)


def clearance(
    stored: Sequence[StoredArtifact],
    held: Collection[str],
    policy: str,
    *,
    needed_bytes: int,
    now: float,
    ttl_s: float,
) -> Clearance:
    """Return what a policy takes off the disk, so that ``needed_bytes`` more are free.

    ``held``: digests that downloads count on, which free nothing. With ``lru`` and ``size`` none of the
    victims could stay, and there are none where all that may go would not suffice; with ``ttl`` those
    past their time go, whatever is needed.
    """
    shares = Shares(stored, held)
    may_go = [a for a in stored if not a.kept_by]
    if policy == "ttl":
        expired = [a for a in may_go if now - a.last_use >= ttl_s]
        return _ordered(shares, sorted(expired, key=_by_use))
    if policy not in {"lru", "size"} or needed_bytes <= 0:
        return Clearance()
    if policy == "lru":
        order = sorted(may_go, key=_by_use)
    else:
        frees = {id(a): shares.freed_among(a, may_go) for a in may_go}
        order = sorted(may_go, key=lambda a: (-frees[id(a)], *_by_use(a)))
    return _ordered(shares, _no_more_than(shares, order, needed_bytes))


def _by_use(artifact: StoredArtifact) -> tuple[float, str, int]:
    return artifact.last_use, artifact.model, artifact.version


def _no_more_than(
    shares: "Shares", order: Sequence[StoredArtifact], needed_bytes: int
) -> Sequence[StoredArtifact]:
    """Return the first of ``order`` that suffice together, without those that could stay."""
    taking = _Taking(shares)
    chosen: list[StoredArtifact] = []
    for artifact in order:
        if taking.freed_bytes >= needed_bytes:
            break
        taking.add(artifact)
        chosen.append(artifact)
    if taking.freed_bytes < needed_bytes:
        return ()
    for artifact in reversed(list(chosen)):
        without = [a for a in chosen if a is not artifact]
        if shares.freed(without) >= needed_bytes:
            chosen = without
    return chosen


def _ordered(shares: "Shares", victims: Sequence[StoredArtifact]) -> Clearance:
    taking = _Taking(shares)
    return Clearance(tuple(victims), tuple(taking.add(a) for a in victims))


class Shares:
    """Who has which blob."""

    def __init__(self, stored: Iterable[StoredArtifact], held: Collection[str] = ()) -> None:
        self.owners: Counter[str] = Counter(held)
        self._sizes: dict[str, int] = {}
        self._models: dict[str, set[str]] = {}
        for artifact in stored:
            self.owners.update(artifact.blobs.keys())
            self._sizes.update(artifact.blobs)
            for digest in artifact.blobs:
                self._models.setdefault(digest, set()).add(artifact.model)

    def freed(self, going: Iterable[StoredArtifact]) -> int:
        """Return the bytes that nobody needs once these are gone."""
        taking = _Taking(self)
        return sum(taking.add(artifact) for artifact in going)

    def freed_among(self, artifact: StoredArtifact, others: Collection[StoredArtifact]) -> int:
        """Return the bytes of an artifact that could be free, if all of ``others`` went as well."""
        having = Counter(digest for other in others for digest in other.blobs)
        return sum(
            n for digest, n in artifact.blobs.items() if having[digest] == self.owners[digest]
        )

    @property
    def shared_bytes(self) -> int:
        """Return the bytes of blobs that more than one model has, each once."""
        return sum(self._sizes[d] for d, models in self._models.items() if len(models) > 1)


class _Taking:
    """Artifacts on their way out, one after the other."""

    def __init__(self, shares: Shares) -> None:
        self._owners = shares.owners
        self._taken: Counter[str] = Counter()
        self.freed_bytes = 0

    def add(self, artifact: StoredArtifact) -> int:
        """Take one more; return the bytes that this frees."""
        freed = 0
        for digest, size in artifact.blobs.items():
            self._taken[digest] += 1
            if self._taken[digest] == self._owners[digest]:
                freed += size
        self.freed_bytes += freed
        return freed


def kept_by(state: State) -> Mapping[str, str]:
    """Return the models whose files may not go by themselves: model -> why, in one word."""
    kept: dict[str, str] = {}
    for operation in state.operations.values():
        if operation.state not in FINAL_STATES and operation.model:
            kept[operation.model] = "BUSY"
    kept |= {slot.model: "SLOT" for slot in state.slots.values()}
    kept |= {lease.model: "LEASED" for lease in state.leases.values()}
    kept |= {model.id: "PINNED" for model in state.models.values() if model.pinned}
    for instance in state.instances.values():
        if instance.state not in (InstanceState.FAILED, InstanceState.BLOCKED):
            kept[instance.model] = "LOADED"
    return kept


def last_use(model: Model, artifact: Artifact, used: float) -> float:
    """Return when an artifact was last of use; ``used``: when its model was.

    Loads take one artifact of a model. Another one is of use until its successor comes.
    """
    if artifact is model.available:
        return max(used, artifact.available_time)
    later = [
        a.available_time
        for a in model.artifacts
        if a.version > artifact.version and a.state is ArtifactState.AVAILABLE
    ]
    return min(later, default=artifact.available_time)


def stored_artifacts(
    state: State,
    blobs: Mapping[tuple[str, int], Mapping[str, int]],
    used: Mapping[str, float],
    kept: Mapping[str, str],
) -> Sequence[StoredArtifact]:
    """Return the artifacts on disk as the policies see them.

    What lies on disk without an AVAILABLE row is on its way in or out: it is kept, and has its blobs.
    """
    found = []
    for (key, version), digests in blobs.items():
        model = state.models.get(key)
        artifact = (
            next((a for a in model.artifacts if a.version == version), None) if model else None
        )
        if model is None or artifact is None or artifact.state is not ArtifactState.AVAILABLE:
            found.append(StoredArtifact(key, version, 0.0, digests, "BUSY"))
            continue
        when = last_use(model, artifact, used.get(key, 0.0))
        # What a client brought has no source that could bring it again.
        uploaded = "UPLOADED" if artifact.source == UPLOAD else ""
        found.append(StoredArtifact(key, version, when, digests, kept.get(key, uploaded)))
    return found


def without_artifact(model: Model, version: int) -> Model:
    """Return the model without one artifact; its entry stays."""
    kept = tuple(a for a in model.artifacts if a.version != version)
    return replace(model, artifacts=kept)
