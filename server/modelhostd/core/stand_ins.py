"""Fallback models: when another model answers instead of one that cannot be loaded, and how the answer says so. Pure."""

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Model

NO_LOAD = frozenset(
    {
        Reason.MODEL_NOT_DOWNLOADED,
        Reason.MODEL_BLOCKED,
        Reason.MODEL_TOO_LARGE,
        Reason.OUT_OF_DEVICE_MEMORY,
        Reason.LOAD_FAILED,
        Reason.LOAD_TIMEOUT,
        Reason.UNSUPPORTED_MODEL,
        Reason.BACKEND_NOT_AVAILABLE,
        Reason.WORKER_LOST,
    }
)
"""What a load is refused with, or ends with: another model may answer meanwhile."""

PARAMETER = b"fallback_model"

# ModelInferResponse.parameters, its entry's key and value, InferParameter.string_param: all length-delimited.
_PARAMETERS, _KEY, _VALUE, _STRING = (number << 3 | 2 for number in (4, 1, 2, 3))


def stand_in(model: Model, error: ModelhostError) -> str:
    """Return the model that answers where ``model`` ended with ``error``; empty = none."""
    return model.config.fallback_model if error.reason in NO_LOAD else ""


def mark(model: str) -> bytes:
    """Return what, put behind an encoded ModelInferResponse, gives it the parameter ``fallback_model``.

    Encoded messages that are put together are one: its maps then have the entries of both.
    Source: https://protobuf.dev/programming-guides/encoding/#last-one-wins
    """
    entry = _field(_KEY, PARAMETER) + _field(_VALUE, _field(_STRING, model.encode()))
    return _field(_PARAMETERS, entry)


def _field(tag: int, content: bytes) -> bytes:
    assert len(content) < 128, "a length of one byte"
    return bytes((tag, len(content))) + content
