"""The errors of the daemon's side, and those of a worker as they come over the wire."""

from modelhostd.core.errors import REASONS, ModelhostError, Reason
from modelhostd.worker.v1 import worker_pb2

RETRY_S = 1.0
RETRY_MAX_S = 86_400.0


def from_header(data: bytes) -> ModelhostError:
    """Return what an ERROR frame says, with nothing in it that the contract has not.

    A reason that is not known becomes INTERNAL. Raises DecodeError for bytes that are no header.
    """
    header = worker_pb2.ErrorHeader.FromString(data)
    try:
        reason = Reason(header.reason)
    except ValueError:
        return ModelhostError(Reason.INTERNAL, "A worker answered with an unknown error.")
    delay_s = header.retry_delay_s if header.HasField("retry_delay_s") else None
    if delay_s is not None and not 0 <= delay_s <= RETRY_MAX_S:
        delay_s = RETRY_S
    known = {key: header.metadata[key] for key in REASONS[reason].keys if key in header.metadata}
    return ModelhostError(reason, header.message, known, delay_s)


def lost(device: str, model: str, exit: str, retry_s: float = RETRY_S) -> ModelhostError:
    """Return WORKER_LOST for something of ``model`` (or of no model) that was in a worker."""
    what = f"model '{model}' was in" if model else "this needs"
    metadata = {"device": device, "exit": exit}
    if model:
        metadata["model"] = model
    return ModelhostError(
        Reason.WORKER_LOST,
        f"The worker of devices/{device} that {what} ended ({exit}). It is being replaced; retry "
        f"in {retry_s:g} s.",
        metadata,
        retry_delay_s=retry_s,
    )


def not_loaded(model: str) -> ModelhostError:
    """Return what a request for an instance gets that no worker holds (any more)."""
    return ModelhostError(
        Reason.MODEL_NOT_LOADED,
        f"Model '{model}' is not loaded in this worker (any more); retry the request.",
        {"model": model, "state": "GONE"},
    )


def aborted(model: str) -> ModelhostError:
    """Return what a request gets whose instance is unloaded without waiting for it."""
    return ModelhostError(
        Reason.CANCELLED,
        f"The request was cancelled: model '{model}' is being unloaded; send it again to load the model.",
    )


def too_late(model: str) -> ModelhostError:
    """Return what a request gets whose deadline had passed before it was sent."""
    return ModelhostError(
        Reason.DEADLINE_EXCEEDED,
        f"The deadline passed before model '{model}' could start; give it more time.",
        {"method": "ModelInfer"},
    )


def queue_full(model: str, device: str, limit: int, *, of_model: bool = False) -> ModelhostError:
    """Return what a request gets when too many are in flight in its worker, or too many ``of_model`` there."""
    whose = f" of model '{model}'" if of_model else ""
    return ModelhostError(
        Reason.QUEUE_FULL,
        f"{limit} requests{whose} are in flight in the worker of devices/{device}; retry later or "
        "send fewer at a time.",
        {"model": model, "queue": "worker", "limit": str(limit)},
        retry_delay_s=RETRY_S,
    )


def bytes_full(model: str, device: str, limit: int) -> ModelhostError:
    """Return what a large request gets when too many bytes are in flight in its worker."""
    return ModelhostError(
        Reason.QUEUE_FULL,
        f"{limit} bytes of large requests are in flight in the worker of devices/{device}; retry "
        "later or send fewer at a time.",
        {"model": model, "queue": "worker bytes", "limit": str(limit)},
        retry_delay_s=RETRY_S,
    )


def too_large(size: int, limit: int) -> ModelhostError:
    """Return what a request gets that no worker takes."""
    return ModelhostError(
        Reason.MESSAGE_TOO_LARGE,
        f"The request has {size} bytes, a worker takes at most {limit}; send a smaller batch.",
        {"limitBytes": str(limit), "actualBytes": str(size)},
    )


def shutting_down() -> ModelhostError:
    """Return what is asked of workers while they are being ended."""
    return ModelhostError(
        Reason.SHUTTING_DOWN, "The daemon is shutting down; retry when it is back.", {}, RETRY_S
    )
