"""Models in real workers whose images can outlive them, and the shortest ways to have, ask, and kill them."""

import dataclasses
from pathlib import Path

from modelhostd.adapters.workers.images import ImageMemory
from modelhostd.ports import Loaded, LoadSpec
from tests.support import wait_until_async
from tests.worker import stored_backend
from tests.worker.harness import CONFIG, decode, encode, ignore
from tests.worker.harness import spec as plain

REAL = dataclasses.replace(
    CONFIG,
    backends=("stored = tests.worker.stored_backend:StoredBackend",),
    start_timeout_s=120.0,
)
DEADLINE_S = 120.0


class Scene:
    """Models of one device, loaded from files that can be taken away, and the worker that they are in."""

    def __init__(self, workers, listener, device: str, folder: Path) -> None:
        self.workers, self.listener, self.device, self.folder = workers, listener, device, folder
        self.exits = 0

    def spec(self, model: str, **options) -> LoadSpec:
        """Return what is loaded: a model and its number, one for each letter."""
        folder = stored_backend.write(self.folder / model, ord(model))
        return plain(model, backend="stored", generation=ord(model), model_dir=folder, **options)

    async def load(self, *models: str) -> list[bytes]:
        """Load models, wait until they can be adopted, and return their answers."""
        for model in models:
            await self.workers.load(self.device, self.spec(model), ignore)
        await wait_until_async(lambda: len(self.worker.leavings._kept) == len(models), DEADLINE_S)
        return [await self.infer(model) for model in models]

    async def infer(self, model: str) -> bytes:
        """Return what a model answers, to the bit."""
        at = self.device, f"{model}-1", ord(model)
        reply = await self.workers.infer(*at, encode({}, name=model), timeout_s=None)
        return decode(reply.payload)[1]["out"].tobytes()

    async def promote(self, model: str) -> Loaded:
        """Bring a model back."""
        return await self.workers.promote(self.device, f"{model}-1", ord(model), ignore)

    async def kill(self) -> dict[str, int]:
        """End the worker as the kernel does; return the bytes that stay, by model."""
        self.worker.kill("signal SIGKILL")
        self.exits += 1
        await wait_until_async(lambda: len(self.listener.exits) == self.exits, DEADLINE_S)
        await self.memory.settled()
        return {instance[0]: size for (instance, _), size in self.listener.exits[-1].kept.items()}

    def hide(self) -> None:
        """Take the weights' files away."""
        for path in self.folder.rglob(stored_backend.FILE):
            path.rename(path.with_suffix(".away"))

    @property
    def worker(self):
        """The one that runs."""
        (worker,) = self.workers._workers()
        return worker

    @property
    def memory(self) -> ImageMemory:
        """The device's memory for images."""
        return self.workers._seats[self.device, ""].images
