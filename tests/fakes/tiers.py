"""The ways of a fake's instances between devices and host memory, and the pretended processes that have them."""

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Phase, Progress
from modelhostd.ports import InferReply, Loaded, LoadSpec
from tests.fakes.gates import first
from tests.fakes.leavings import Leavings
from tests.fakes.pieces import Pieces
from tests.fakes.worker_errors import not_loaded, worker_lost


@dataclass
class Process:
    """One pretended worker: the instances it holds and the requests in flight in it."""

    device: str
    pid: int
    instances: dict[tuple[str, int], LoadSpec] = field(default_factory=dict)
    loaded: dict[tuple[str, int], Loaded] = field(default_factory=dict)
    """What was answered to each load that is held, warm ones included."""
    warm: dict[tuple[str, int], LoadSpec] = field(default_factory=dict)
    given_up: set[tuple[str, int]] = field(default_factory=set)
    """Whose copies were to be dropped: nothing of them outlives a crash."""
    loads: set["asyncio.Future[None]"] = field(default_factory=set)
    requests: dict["asyncio.Future[InferReply]", str] = field(default_factory=dict)
    """In flight -> model. A cancelled request leaves at once, as in the real port."""
    known: dict[str, str] = field(default_factory=dict)


class Tiers(Pieces):
    """Demotes, promotes and drops copies of what :class:`tests.fakes.workers.FakeWorkers` loads; its controls are told of there."""

    def __init__(self) -> None:
        super().__init__()
        self.load_s: dict[str, float] = {}
        self.promote_errors: dict[str, ModelhostError] = {}
        self.leavings = Leavings()
        self.stuck: set[str] = set()
        self.log: list[tuple[str, str, str, int]] = []
        self.peak_bytes: dict[str, int] = {}
        self._processes: dict[tuple[str, str], Process] = {}
        self._bytes: dict[tuple[str, str, int], int] = {}

    def device_bytes(self, device: str) -> int:
        """Return the bytes that instances hold on ``device`` now, loads included."""
        return sum(size for key, size in self._bytes.items() if key[0] == device)

    async def load(self, device: str, spec: LoadSpec, report: Callable[[Progress], None]) -> Loaded:
        """See :class:`modelhostd.ports.Workers`."""
        raise NotImplementedError

    async def demote(self, device: str, instance: str, generation: int) -> int:
        """See :class:`modelhostd.ports.Workers`."""
        process, spec = self._find(device, instance, generation, warm=True)
        key = instance, generation
        if process is None or spec is None:
            await asyncio.sleep(0)
            return self.leavings.bytes((device, *key))
        kept = process.loaded[key].host_bytes
        if process.instances.pop(key, None) is None:
            return kept
        await self.demote_gate(spec.model).wait()
        self._bytes.pop((device, *key), None)
        self.log.append(("demote", device, spec.model, generation))
        if kept and key in process.loaded and process in self._processes.values():
            process.warm[key] = spec
            return kept
        process.loaded.pop(key, None)
        return 0

    async def drop_copy(self, device: str, instance: str, generation: int) -> int:
        """See :class:`modelhostd.ports.Workers`; of the models in ``stuck`` the copy stays."""
        key = instance, generation
        process, spec = self._find(device, instance, generation, warm=True)
        if process is None or spec is None or key in process.warm:
            await asyncio.sleep(0)
            held = self.leavings.bytes((device, *key))
            return held if process is None or spec is None else process.loaded[key].host_bytes
        process.given_up.add(key)
        await self.copy_gate(spec.model).wait()
        loaded = process.loaded.get(key)
        if loaded is None or process not in self._processes.values():
            return 0
        if spec.model in self.stuck:
            return loaded.host_bytes
        process.loaded[key] = dataclasses.replace(loaded, host_bytes=0)
        self.log.append(("drop_copy", device, spec.model, generation))
        return 0

    async def promote(
        self, device: str, instance: str, generation: int, report: Callable[[Progress], None]
    ) -> Loaded:
        """See :class:`modelhostd.ports.Workers`; reports its bytes once."""
        await asyncio.sleep(0)
        if (left := (device, instance, generation)) in self.leavings.left:
            loaded = await self.load(device, self.leavings.spec(left), report)
            return dataclasses.replace(loaded, adopted_bytes=self.leavings.taken(left))
        process, spec = self._find(device, instance, generation, warm=True)
        key = instance, generation
        if process is None:
            raise worker_lost(device, "not running")
        if spec is None:
            raise not_loaded(process.known.get(instance, instance))
        loaded = process.loaded[key]
        if key in process.instances:
            return loaded
        if (error := self.promote_errors.get(spec.model)) is not None:
            raise error
        size = self._bytes[device, instance, generation] = loaded.measured_bytes
        self.peak_bytes[device] = max(self.peak_bytes.get(device, 0), self.device_bytes(device))
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        process.loads.add(lost)
        try:
            await first(self.promote_gate(spec.model).wait(), lost)
        except BaseException:
            self._bytes.pop((device, instance, generation), None)
            raise
        finally:
            process.loads.discard(lost)
            if not lost.cancel() and not lost.cancelled():
                lost.exception()
        report(Progress(phase=Phase.LOADING, done_bytes=size, total_bytes=size))
        process.warm.pop(key, None)
        process.instances[key] = spec
        self.log.append(("promote", device, spec.model, generation))
        return dataclasses.replace(loaded, load_s=self.load_s.get(spec.model, 0.0))

    def _find(
        self, device: str, instance: str, generation: int, *, warm: bool = False
    ) -> tuple[Process | None, LoadSpec | None]:
        shared = None
        for (name, _), process in self._processes.items():
            if name == device:
                shared = process
                spec = process.instances.get((instance, generation))
                if spec is None and warm:
                    spec = process.warm.get((instance, generation))
                if spec is not None:
                    return process, spec
        return shared, None
