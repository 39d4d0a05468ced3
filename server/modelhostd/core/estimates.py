"""What a model is taken to need after it found too little memory. Pure.

Nobody can know before what a library takes beside the weights. So the model's share grows, by what was missing where that
was told. What its load lacked is given up when a load has measured the truth; what its requests lacked by halves, as no
request lacks any more: one unusual request is no reason to keep its memory for ever.
"""

from collections.abc import Mapping

from modelhostd.core.values import dataclass

MODEL_PART = 4
"""What is missing is at least this part of the model, ..."""
DEVICE_PART = 100
"""... and this part of the device: what libraries take goes by that, and one allocation that fails is rarely the last."""

REQUESTS_PART = 4
"""What requests are taken to need beside a model is at most this part of its device: one absurd request must not have it all."""
HALVED_AFTER_S = 3600.0
"""How long after the last request that lacked memory half of what is kept for such goes, and so on."""
DIGITS_MAX = 19
"""Of a number that a worker says."""


@dataclass(frozen=True, slots=True)
class Room:
    """A device as a model that found too little memory there sees it. Bytes."""

    capacity: int
    free: int
    """What the ledger had left beside the model, and which was not enough."""
    most: int
    """What the model can have once all has gone that neither a pin nor a lease holds."""


def missing_bytes(metadata: Mapping[str, str]) -> int:
    """Return what the allocation that failed asked for, as a worker says it in its error; 0 = it does not."""
    said = metadata.get("neededBytes", "")
    return int(said) if said.isascii() and said.isdigit() and len(said) <= DIGITS_MAX else 0


def for_requests(weights: int, size: int, missing: int, room: Room) -> int:
    """Return what a model that holds ``size`` bytes, so many of them weights, is taken to need after a request to it found
    too little; ``size`` where no more can be had for it, or where what it asked for could not be had on that device at all.
    """
    if size + missing > room.most:
        return size
    return max(
        size, min(corrected_bytes(size, missing, room), weights + room.capacity // REQUESTS_PART)
    )


def eased(extra: int, quiet_s: float) -> int:
    """Return what is still kept of ``extra`` bytes that requests lacked, so long after the last of those."""
    return extra >> min(64, max(0, int(quiet_s // HALVED_AFTER_S)))


def corrected_bytes(size: int, missing: int, room: Room) -> int:
    """Return what a model that needs more than ``size`` bytes is taken to need, at most ``room.most``.

    It is more than what was free: else it would be tried again with what it had. ``missing``: what the failed
    allocation asked for; 0 = not known.
    """
    more = max(missing, size // MODEL_PART, room.capacity // DEVICE_PART, room.free + 1)
    return max(size, min(size + more, room.most))
