"""The same clients, who fetch, replace and delete the models and their files meanwhile."""

from hypothesis import strategies as st
from hypothesis.stateful import rule

from bench.faulty_scene import files_of
from tests.live.machine import MODELS, Residents, step
from tests.live.world import ROOM, SIZES

WIDE = 2 * ROOM
"""Room for what is predicted of any model, which is more than what is measured."""


class Library(Residents):
    """Steps on what is on disk. A model that is gone is refused by its name, and can be made again at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[str] = set()
        """Models whose files, or themselves, may be gone."""

    @rule(model=MODELS)
    @step
    def fetch(self, model: str) -> None:
        self.ask(lambda: self.client.pull(model, wait=False))

    @rule(model=MODELS, force=st.booleans())
    @step
    def delete_files(self, model: str, force: bool) -> None:
        self.touched.add(model)
        self.ask(lambda: self.client.delete_files(model, force=force, wait=False))

    @rule(model=MODELS, force=st.booleans())
    @step
    def delete(self, model: str, force: bool) -> None:
        self.touched.add(model)
        self.ask(lambda: self.client.delete(model, force=force, wait=False))

    @rule()
    @step
    def make_again(self) -> None:
        for model in sorted(self.touched):
            self.attempt(lambda model=model: self.world.add(model))
            self.ask(lambda model=model: self.client.pull(model, wait=False))

    @rule(model=MODELS)
    @step
    def upload(self, model: str) -> None:
        """Bring weights that differ from all before them in their last byte, and in nothing else."""
        self.touched.add(model)
        weights = files_of(SIZES[model])["model.safetensors"]
        path = self.world.scene.folder / "model.safetensors"
        path.write_bytes(weights[:-4] + self.world.steps.to_bytes(4, "little"))
        # What is not registered would be, without what this test needs to know of it.
        self.attempt(lambda: self.client.get(model) and self.client.upload(model, [path]))

    def restore(self) -> None:
        """Have each model again, measured as in the beginning."""
        if not self.touched:
            return
        self.roof = max(self.roof, WIDE)
        self.client.set_budget(self.world.device, WIDE)
        there = {model.name.removeprefix("models/") for model in self.client.models()}
        for model in sorted(self.touched):
            if model in there:
                self.client.update(model, {"config.keep_alive": -1.0})
                self.client.unpin(model)
                self.client.unblock(model)
                self.client.unload(model)
            else:
                self.world.add(model)
            self.world.measure(model)
        self.touched.clear()
