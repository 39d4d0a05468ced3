"""The ledger: who holds how many bytes of each device and of host memory. Pure."""

from collections.abc import Mapping


class Ledger:
    """Who holds how many bytes of each device, and of host memory (``host_tier.HOST``).

    Bytes count until they are really free. Invariant: nothing is admitted above the capacity, and
    ``used(device)`` is the sum of its entries.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], int] = {}

    def reserve(self, device: str, model: str, size: int) -> None:
        """Note predicted bytes before a load starts."""
        assert size >= 0
        assert (device, model) not in self._entries
        self._entries[device, model] = size

    def true_up(self, device: str, model: str, size: int) -> int:
        """Replace predicted by measured bytes; returns measured less predicted."""
        error = size - self._entries[device, model]
        self._entries[device, model] = size
        return error

    def release(self, device: str, model: str) -> int:
        """Forget an entry once its memory is free; returns its bytes (0 if there is none)."""
        return self._entries.pop((device, model), 0)

    def held(self, device: str, model: str) -> int:
        """Return the bytes of one entry, or 0."""
        return self._entries.get((device, model), 0)

    def hold(self, device: str, model: str, size: int) -> None:
        """Note what a model holds from now on, whatever it held before; 0 = nothing."""
        if size:
            self._entries[device, model] = size
        else:
            self.release(device, model)

    def of(self, device: str) -> Mapping[str, int]:
        """Return the bytes held on a device by model."""
        return {model: size for (d, model), size in self._entries.items() if d == device}

    def used(self, device: str) -> int:
        """Return the bytes held on a device."""
        return sum(size for (d, _), size in self._entries.items() if d == device)
