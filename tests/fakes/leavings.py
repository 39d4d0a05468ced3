"""What fake workers leave behind when they crash: the images of the models that a test names."""

from collections.abc import Mapping

from modelhostd.ports import Loaded, LoadSpec
from tests.fakes.worker_errors import not_loaded

Key = tuple[str, str, int]
"""Device, instance and generation."""


class Leavings:
    """Images of the models in ``outliving`` outlive a crash; of those in ``damaged`` the checksum does not hold then."""

    def __init__(self) -> None:
        self.outliving: set[str] = set()
        self.damaged: set[str] = set()
        self.left: dict[Key, tuple[LoadSpec, Loaded]] = {}
        self.taken_models: set[str] = set()
        """Whose images were taken over."""

    def leave(
        self, device: str, own: str, held: Mapping[Key, tuple[LoadSpec, Loaded]]
    ) -> Mapping[tuple[str, int], int]:
        """Take what a worker held (``own``: of one model alone); return what is left of it and of those before it."""
        for key, (spec, loaded) in held.items():
            # On the CPU the image is where the weights are; elsewhere there may be none.
            if spec.model in self.outliving and (loaded.host_bytes or device == "cpu"):
                self.left[key] = spec, loaded
        here = [(key, spec.owner) for key, (spec, _) in self.left.items() if key[0] == device]
        return {key[1:]: self.bytes(key) for key, owner in here if owner == own}

    @property
    def warm(self) -> dict[str, tuple[str, int]]:
        """Model -> (device, bytes of its image)."""
        return {spec.model: (key[0], self.bytes(key)) for key, (spec, _) in self.left.items()}

    def spec(self, key: Key) -> LoadSpec:
        """Return what is to be loaded from an image. Raises MODEL_NOT_LOADED where it does not hold."""
        spec, _ = self.left[key]
        if spec.model in self.damaged:
            raise not_loaded(spec.model)
        return spec

    def model(self, key: Key) -> str:
        """Return whose image it is, or nothing."""
        return self.left[key][0].model if key in self.left else ""

    def taken(self, key: Key) -> int:
        """Take an image over; return its size."""
        size = self.bytes(key)
        self.taken_models.add(self.left.pop(key)[0].model)
        return size

    def bytes(self, key: Key) -> int:
        """Return the size of one image, 0 where there is none."""
        loaded = self.left[key][1] if key in self.left else None
        return (loaded.host_bytes or loaded.measured_bytes) if loaded is not None else 0

    def clear(self) -> None:
        """Leave nothing."""
        self.outliving.clear()
        self.left.clear()
