"""A registry over a fake database, and short edits to give it."""

from collections.abc import Sequence

from modelhostd.core.resources import Event, Instance, InstanceState, Kind, Model, Source, Tier
from modelhostd.core.state import Edit
from modelhostd.host.registry import History, Registry
from tests.fakes.clock import FakeClock
from tests.fakes.database import FakeDatabase, FakeDisk


def model(key: str, name: str = "") -> Edit:
    value = Model(key, f"uid-{key}", Source("hf://org/x"), 1.0, 1.0, display_name=name)
    return Edit(Kind.MODEL, key, value, "CREATED")


def instance(key: str, state: InstanceState = InstanceState.QUEUED, load_s: float = 0.0) -> Edit:
    value = Instance(key, "1", 1, "sim-0", state, Tier.DISK, load_s=load_s)
    return Edit(Kind.INSTANCE, f"{key}/1", value, state.value)


def gone(key: str) -> Edit:
    return Edit(Kind.INSTANCE, f"{key}/1", None, "GONE")


class Desk:
    """A registry over a fake database, and what it published."""

    def __init__(self, disk: FakeDisk, clock: FakeClock, history: History | None = None) -> None:
        self.database = FakeDatabase(disk)
        self.registry = Registry(self.database, clock, history)
        self.published: list[Event] = []
        self.registry.subscribe(self.published.extend)

    @property
    def models(self) -> Sequence[str]:
        return list(self.registry.committed.models)
