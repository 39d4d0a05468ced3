"""The daemon that all runs of the machine share, and what was seen of it so far."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from bench.faulty_scene import Scene

SIZES: Mapping[str, int] = {"a": 400_000, "b": 400_000, "c": 300_000, "d": 900_000, "e": 100_000}
HOST_ROOM = 1_500_000
"""What copies in host memory may take."""
LOG_CHARS = 6000
"""How much of the daemon's log a finding shows."""
ROOM = 1_000_000
"""The budget that a run begins with: for every model alone, for some of them together."""


@dataclass
class World:
    """A daemon that all runs go on with until one finds something, and what was done in it so far."""

    start: Callable[[], AbstractContextManager[Scene]]
    device: str = "cpu"
    backend: str = "faulty"
    steps: int = 0
    crashes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """How often each error was answered."""
    done: list[str] = field(default_factory=list)
    """The steps of the present run."""
    finding: str = ""
    """What the first run found that did not hold, and its steps: by another's timing it may not come again."""
    taken: dict[str, int] = field(default_factory=dict)
    """What each model was measured to take of the device."""
    scene: Scene = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack)
    _broken: bool = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def begin(self) -> None:
        """Begin a run: in a daemon without models in memory, a new one where the last run broke it."""
        self.done.clear()
        if not self._broken:
            return
        self._stack.close()
        self.scene = self._stack.enter_context(self.start())
        self._prepare()
        self._broken = False

    def found(self, what: str) -> None:
        """Note what does not hold."""
        self._broken = True
        if not self.finding:
            log = self.scene.log[-LOG_CHARS:]
            self.finding = "\n".join([what, "after", *self.done, "the daemon wrote at last", log])

    def _prepare(self) -> None:
        client = self.scene.client
        for name in SIZES:
            self.add(name)
            self.measure(name)
        client.update_settings({"drain_timeout": 3.0, "host_budget_bytes": HOST_ROOM})

    def add(self, name: str) -> None:
        """Register one of the models, and fetch nothing."""
        config: dict[str, Any] = {
            "backend": self.backend,
            "backend_options": {"bytes": SIZES[name]},
            "device": f"devices/{self.device}",
            "load_timeout": 280.0,  # the first load of a worker may import a library
        }
        self.scene.client.add(f"hf://org/{name}", name, config=config)

    def measure(self, name: str) -> None:
        """Fetch and load a model once: what is measured, and no prediction any more, is reserved from then on."""
        client = self.scene.client
        client.pull(name)
        client.load(name)
        self.taken[name] = client.instance(name).measured_bytes
        client.unload(name)
