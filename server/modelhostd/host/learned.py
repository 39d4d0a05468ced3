"""What the loads and requests of each model have taught: the bytes and seconds that it takes, and how it failed.

Predictions come from its files' headers; what was measured replaces them, as long as it is the same model.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from modelhostd.core.errors import ModelhostError
from modelhostd.core.estimates import Room, corrected_bytes, eased, for_requests
from modelhostd.core.failed_loads import REMEMBERED, FailedLoad
from modelhostd.core.registry import needs_reload
from modelhostd.core.resources import Model, ModelConfig
from modelhostd.ports import Loaded, LoadSpec

LOAD_TIMEOUT_BASE_S = 120.0
LOAD_BYTES_PER_S = 50_000_000.0
COMPILE_S = 600.0
"""What torch's compiler is given: it took all-MiniLM-L6-v2 one to four minutes on two cores."""
LOAD_S_WEIGHT = 0.5
SWAP_BYTES_PER_S = 10e9
"""What a first swap-in is expected to copy in a second."""


class Measured(NamedTuple):
    """What the last load of a model really took, of its device and of host memory, and how it was loaded."""

    spec: LoadSpec
    bytes: int
    host_bytes: int


class Short(NamedTuple):
    """What a model is taken to need after it found too little memory, and which model and where that was."""

    version: int
    config: ModelConfig
    device: str
    bytes: int


class Lacked(NamedTuple):
    """What a model's requests are taken to need with its weights, after one found too little memory, and which model that was."""

    version: int
    config: ModelConfig
    device: str
    bytes: int
    weights: int
    """Of these bytes, those of the weights that were loaded then: another version has others."""
    since: float
    """When a request last lacked memory, by the monotonic clock."""

    def kept(self, size: int, now: float) -> int:
        """Return what is still kept for requests of ``size`` bytes with the weights."""
        return eased(max(0, size - self.weights), now - self.since)


class Learned:
    """One table for each kind of experience, by model id.

    ``room`` tells what there is for a model on a device; ``cache_bytes`` the most that one takes for the texts that it
    is at; ``now`` the time by the monotonic clock.
    """

    def __init__(
        self,
        room: Callable[[str, str], Room],
        cache_bytes: Callable[[Model], int],
        now: Callable[[], float],
    ) -> None:
        self._room = room
        self._cache_bytes = cache_bytes
        self._now = now
        self.measured: dict[str, Measured] = {}
        """What the last load of each model really took: the truth after the prediction."""
        self.load_s: dict[str, float] = {}
        """What a load of each model takes from disk, the newer loads weighing more."""
        self.swap_s: dict[str, float] = {}
        """The same from host memory."""
        self.failed: dict[str, FailedLoad] = {}
        """The last load of each model whose last load failed."""
        self.short: dict[str, Short] = {}
        """The corrected estimate of each model whose last load found too little memory."""
        self.working: dict[str, Lacked] = {}
        """What requests take beside the weights of each model whose requests found too little memory."""

    # --- bytes ----------------------------------------------------------------------------------

    def needed_bytes(self, model: Model, device: str = "") -> int:
        """Return what loading the model takes: as measured when it was loaded so before, else as
        predicted.

        What its requests take beside the weights is a part of it. After a load or a request that found too little
        memory it is more, but never more than it could be given: a guess evicts others, and refuses nothing.
        """
        weights = self._weight_bytes(model)
        return max(
            weights + self.working_bytes(model, device), self._guess(self.short, model, device)
        )

    def working_bytes(self, model: Model, device: str = "") -> int:
        """Return what requests to the model are taken to need beside its weights."""
        lacked, guess = self.working.get(model.id), self._guess(self.working, model, device)
        extra = lacked.kept(guess, self._now()) if lacked is not None else 0
        return max(self._cache_bytes(model), extra)

    def kept_bytes(self, model: Model) -> int:
        """Return the same without a look at what could be given now, which may be less than what is reserved already."""
        return max(self._cache_bytes(model), self.lacked_bytes(model))

    def lacked_bytes(self, model: Model) -> int:
        """Return what is still kept of what the model's requests lacked, those to the version that it had then."""
        lacked = self.working.get(model.id)
        return 0 if lacked is None else lacked.kept(lacked.bytes, self._now())

    def _weight_bytes(self, model: Model) -> int:
        found = self._known(model)
        return found.bytes if found is not None else predicted_bytes(model)

    def _guess(self, guesses: "Mapping[str, Short | Lacked]", model: Model, device: str) -> int:
        """Return what is guessed of the model as it is now, as far as it could be given; 0 = nothing."""
        short, artifact = guesses.get(model.id), model.available
        if short is None or artifact is None or short.version != artifact.version:
            return 0
        if needs_reload(short.config, model.config):
            return 0
        return min(short.bytes, self._room(model.id, device or short.device).most)

    def image_bytes(self, model: Model) -> int:
        """Return what a copy of the model's weights takes of host memory."""
        found = self._known(model)
        return found.host_bytes if found is not None else predicted_bytes(model)

    def fell_short(self, model: Model, version: int, device: str, size: int, missing: int) -> bool:
        """Note that a load of ``size`` bytes found too little memory; whether another one would have more.

        The corrected estimate holds until a load has measured the truth.
        """
        corrected = corrected_bytes(size, missing, self._room(model.id, device))
        self.short[model.id] = Short(version, model.config, device, corrected)
        return corrected > size

    def request_fell_short(
        self, model: Model, version: int, device: str, weights: int, size: int, missing: int
    ) -> int:
        """Note that a request found too little memory beside the ``size`` bytes that its model holds, so many of them
        ``weights``; return what the model is taken to need from now on.
        """
        needed = for_requests(weights, size, missing, self._room(model.id, device))
        known = self.working.get(model.id)
        if needed > size or (known is not None and known.version == version):
            loaded = self.measured.get(model.id)
            config = loaded.spec.config if loaded is not None else model.config
            now = self._now()
            self.working[model.id] = Lacked(
                version, config, device, max(needed, size), weights, now
            )
        return needed

    def loaded(self, spec: LoadSpec, loaded: Loaded) -> None:
        """Note what a load from disk took."""
        model = spec.model
        host_bytes, before = loaded.host_bytes, self.measured.get(model)
        if not spec.keep_image:
            # It was told to keep no copy, which says nothing of what one takes.
            same = before is not None and before.spec.version == spec.version
            host_bytes = before.host_bytes if before and same else spec.predicted_bytes
        self.measured[model] = Measured(spec, loaded.measured_bytes, host_bytes)
        _weigh(self.load_s, model, loaded.load_s)
        self.failed.pop(model, None)
        self.short.pop(model, None)

    def swapped_in(self, model: str, loaded: Loaded) -> None:
        """Note what a swap-in took."""
        self.short.pop(model, None)
        if not loaded.adopted_bytes:
            _weigh(self.swap_s, model, loaded.load_s)

    def _known(self, model: Model) -> Measured | None:
        """Return what was measured of the model as it is now: these files, this config."""
        found, artifact = self.measured.get(model.id), model.available
        if found is None or artifact is None or found.spec.version != artifact.version:
            return None
        return None if needs_reload(found.spec.config, model.config) else found

    # --- seconds --------------------------------------------------------------------------------

    def reload_s(self, model: str, size: int, *, warm: bool) -> float:
        """Return what coming back to the device is expected to take: with ``warm`` from host memory, else from disk."""
        if not warm:
            return self.load_s.get(model, 0.0)
        return self.swap_s.get(model, size / SWAP_BYTES_PER_S)

    # --- failures -------------------------------------------------------------------------------

    def load_failed(self, model: Model, error: ModelhostError, now: float) -> None:
        """Remember a load that failed, if that tells something of the model."""
        if error.reason not in REMEMBERED or model.available is None:
            return
        version, before = model.available.version, self.failed.get(model.id)
        if before is None:
            self.failed[model.id] = FailedLoad(version, model.edit, error, now)
        else:
            self.failed[model.id] = before.again(version, model.edit, error, now)

    def refusal(self, model: Model, now: float) -> ModelhostError | None:
        """Return why a request does not make the model load from disk again now, if its last load failed."""
        known, artifact = self.failed.get(model.id), model.available
        if known is None or artifact is None:
            return None
        return known.refusal(artifact.version, model.edit, now)

    def forget(self, model: str) -> None:
        """Forget what was learned of a deleted model: its id may come again."""
        known = (self.measured, self.load_s, self.swap_s, self.failed, self.short, self.working)
        for table in known:
            table.pop(model, None)


def predicted_bytes(model: Model) -> int:
    """Return what loading the model's newest artifact is expected to take of a device.

    The safetensors headers' sum where there are any, else the size of the files.
    """
    artifact = model.available
    if artifact is None:
        return 0
    return artifact.predicted_bytes or artifact.size_bytes


def load_timeout_s(model: Model, size: int) -> float:
    """Return the model's load timeout; by default 120 s and a second for each 50 MB, more where it is compiled."""
    own = model.config.load_timeout_s
    if own is not None:
        return own
    compiling_s = COMPILE_S if model.config.backend_options.get("compile") is True else 0.0
    return LOAD_TIMEOUT_BASE_S + size / LOAD_BYTES_PER_S + compiling_s


def _weigh(known: dict[str, float], model: str, seconds: float) -> None:
    before = known.get(model, seconds)
    known[model] = before + (seconds - before) * LOAD_S_WEIGHT
