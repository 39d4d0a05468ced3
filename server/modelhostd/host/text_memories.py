"""What the language models on disk remember of a token, by model and version: read once, from their config.json."""

from collections.abc import Iterable

from modelhostd.core.resources import ArtifactState, Model
from modelhostd.core.text_memory import TASK, TextMemory, read_config
from modelhostd.ports import Files


class TextMemories:
    """Known before a model can be loaded: a plan does not wait for the disk."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._known: dict[str, dict[int, TextMemory]] = {}

    async def read(self, model: str, version: int) -> None:
        """Read what there is to know of an artifact whose files are there."""
        found = read_config(await self._files.read_config(model, version))
        if found is not None:
            self._known.setdefault(model, {})[version] = found

    async def take_up(self, models: Iterable[Model]) -> None:
        """Read what there is to know of all language models."""
        for model in models:
            for artifact in model.artifacts if model.task == TASK else ():
                if artifact.state is ArtifactState.AVAILABLE:
                    await self.read(model.id, artifact.version)

    def cache_bytes(self, model: Model) -> int:
        """Return the most that the model takes for the texts that it is at; 0 = it is of another task, or not known."""
        artifact, backend = model.available, model.config.backend
        if artifact is None or model.task != TASK or backend not in ("", TASK):
            return 0
        found = self._known.get(model.id, {}).get(artifact.version)
        return found.cache_bytes(model.config) if found is not None else 0

    def forget(self, model: str) -> None:
        """Forget a deleted model."""
        self._known.pop(model, None)
