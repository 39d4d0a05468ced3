"""What the fake workers answer where the real ones refuse."""

from modelhostd.core.errors import ModelhostError, Reason


def not_loaded(model: str) -> ModelhostError:
    """Return what a worker answers to a request for an instance it does not hold."""
    return ModelhostError(
        Reason.MODEL_NOT_LOADED,
        f"Model '{model}' is not loaded in this worker (any more); retry the request.",
        {"model": model, "state": "GONE"},
    )


def aborted(model: str) -> ModelhostError:
    """Return what a request gets whose instance goes without waiting for it."""
    return ModelhostError(Reason.CANCELLED, f"Model '{model}' is being unloaded.")


def deadline_exceeded(model: str) -> ModelhostError:
    """Return what a worker answers to a request whose deadline passed before it started."""
    return ModelhostError(
        Reason.DEADLINE_EXCEEDED,
        f"The deadline passed before model '{model}' could start on the request.",
        {"method": "ModelInfer"},
    )


def worker_lost(device: str, exit: str) -> ModelhostError:
    """Return what everything in a worker that ended is answered."""
    return ModelhostError(
        Reason.WORKER_LOST,
        f"The worker of devices/{device} ended ({exit}); retry, it is being replaced.",
        {"device": device, "exit": exit},
        retry_delay_s=1.0,
    )
