"""Turns what a backend raised into the one typed error that the caller is told."""

import logging
import re
import uuid
from pathlib import Path

from modelhostd.core.errors import REASONS, ModelhostError, Reason
from modelhostd.worker.backend import (
    BadInputError,
    Cancelled,
    LoadError,
    UnsupportedModelError,
)
from modelhostd.worker.tensors import refuse
from modelhostd.worker.v1 import worker_pb2

log = logging.getLogger("modelhostd.worker")

MAX_TEXT_CHARACTERS = 2_000

# "Tried to allocate 2.00 GiB." (torch on CUDA), "you tried to allocate 4096 bytes" (on the CPU), "Unable to
# allocate 8.00 GiB for an array" (numpy).
_ALLOCATION = re.compile(r"allocate (\d{1,20}(?:\.\d+)?) (bytes|[KMGTPE]iB)")
_UNITS = {"bytes": 1, **{f"{c}iB": 1024**n for n, c in enumerate("KMGTPE", 1)}}


def answer_too_large(size: int, limit: int) -> ModelhostError:
    """Return what a request gets whose answer no message holds; ``size``: in bytes, or the least that it would have."""
    return ModelhostError(
        Reason.MESSAGE_TOO_LARGE,
        f"The response has {size} bytes or more, at most {limit} are sent; ask for fewer outputs or "
        "send a smaller batch.",
        {"limitBytes": str(limit), "actualBytes": str(size)},
    )


def cancelled() -> ModelhostError:
    """Return what a request that nobody waits for is answered with."""
    return ModelhostError(Reason.CANCELLED, "The request was cancelled by its caller.")


def late(model: str, *, started: bool) -> ModelhostError:
    """Return what a request is answered with whose deadline has passed."""
    when = "while model '{}' worked on the request" if started else "before model '{}' could start"
    return ModelhostError(
        Reason.DEADLINE_EXCEEDED,
        f"The deadline passed {when.format(model)}; give it more time or send less at once.",
        {"method": "ModelInfer"},
    )


def unread(model: str, seconds: float) -> ModelhostError:
    """Return what a stream ends with whose reader has taken nothing for so long."""
    return ModelhostError(
        Reason.QUEUE_FULL,
        f"Answers of model '{model}' were not read for {seconds:.0f} s, so that their stream was ended; read "
        "them as they come, or ask for one whole answer.",
        {"model": model, "queue": "unread answers", "limit": f"{seconds:.0f} s"},
        retry_delay_s=1.0,
    )


def not_loaded(model: str) -> ModelhostError:
    """Return what a request for an instance that is not here (any more) is answered with."""
    return ModelhostError(
        Reason.MODEL_NOT_LOADED,
        f"Model '{model}' is not loaded in this worker (any more); retry the request.",
        {"model": model, "state": "GONE"},
    )


def damaged(model: str) -> ModelhostError:
    """Return what an adoption is answered with whose image is not what it was."""
    return ModelhostError(
        Reason.MODEL_NOT_LOADED,
        f"What '{model}' left in memory has changed since it was hashed; load it from its files.",
        {"model": model, "state": "DAMAGED"},
    )


def not_adopted(model: str) -> ModelhostError:
    """Return what an adoption is answered with whose image the model's library does not take as it is."""
    return ModelhostError(
        Reason.MODEL_NOT_LOADED,
        f"What '{model}' left in memory is not what its library makes of it again; load it from its files.",
        {"model": model, "state": "NOT_ADOPTED"},
    )


def from_infer(error: BaseException, model: str, device: str) -> ModelhostError:
    """Return the error of an inference that raised ``error``; an unexpected one is logged with its id."""
    if isinstance(error, ModelhostError):
        return error
    if isinstance(error, Cancelled):
        return cancelled()
    if isinstance(error, BadInputError):
        return _bad_input(error, model)
    if is_out_of_memory(error):
        return _out_of_memory(model, device, "The request", error)
    error_id = uuid.uuid4().hex[:12]
    log.error("inference of model %s failed, error %s", model, error_id, exc_info=error)
    return ModelhostError(
        Reason.INFERENCE_FAILED,
        f"Model '{model}' failed on this request (error {error_id}); the daemon's log has the "
        "details under this id.",
        {"model": model, "errorId": error_id},
    )


def from_load(
    error: BaseException, model: str, backend: str, task: str, device: str, model_dir: Path
) -> ModelhostError:
    """Return the error of a load that raised ``error``. Paths are cut out of library texts."""
    if isinstance(error, ModelhostError):
        return error
    if isinstance(error, Cancelled):
        return ModelhostError(Reason.CANCELLED, f"The load of model '{model}' was cancelled.")
    if is_out_of_memory(error):
        return _out_of_memory(model, device, "Loading it", error)
    cause = clean(str(error), model_dir) or "no details"
    if isinstance(error, UnsupportedModelError):
        return ModelhostError(
            Reason.UNSUPPORTED_MODEL,
            f"Backend '{backend}' cannot serve model '{model}': {cause}",
            {"model": model, "task": task, "cause": cause},
        )
    if isinstance(error, BadInputError):
        cause = f"backend option {error}"
    if not isinstance(error, LoadError | BadInputError | OSError | ValueError):
        error_id = uuid.uuid4().hex[:12]
        log.error("load of model %s failed, error %s", model, error_id, exc_info=error)
        cause = f"{cause} (error {error_id} in the daemon's log)"
    return ModelhostError(
        Reason.LOAD_FAILED,
        f"Backend '{backend}' could not load model '{model}': {cause}",
        {"model": model, "backend": backend, "cause": cause},
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory: Python's own error, or torch's by name (torch may not be here)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # On the CPU torch has no type for it.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def clean(text: str, model_dir: Path) -> str:
    """Return a library's message as one bounded line that names no path of this host."""
    line = " ".join(text.replace(str(model_dir), "<model>").split())
    return line if len(line) <= 500 else line[:497] + "..."


def encode(error: ModelhostError) -> bytes:
    """Return an error as an ERROR frame's header, its texts cut to what a frame holds."""
    header = worker_pb2.ErrorHeader(
        code=REASONS[error.reason].code,
        reason=error.reason,
        message=_cut(error.message),
        metadata={key: _cut(value) for key, value in error.metadata.items()},
    )
    if error.retry_delay_s is not None:
        header.retry_delay_s = error.retry_delay_s
    return header.SerializeToString()


def _cut(text: str) -> str:
    # Lone surrogates (from undecodable file names) have no UTF-8 form.
    return text[:MAX_TEXT_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def _bad_input(error: BadInputError, model: str) -> ModelhostError:
    return refuse(
        f"{error.field} for model '{model}': expected {error.expected}, got {error.actual!r}"[:500],
        error.field,
        error.expected,
        error.actual,
    )


def _out_of_memory(model: str, device: str, what: str, error: BaseException) -> ModelhostError:
    return ModelhostError(
        Reason.OUT_OF_DEVICE_MEMORY,
        f"{what} needs more memory than devices/{device} has left for model '{model}'; unload "
        "another model, send smaller batches, or raise the device's budget.",
        {"model": model, "device": device, **_asked_for(error)},
    )


def _asked_for(error: BaseException) -> dict[str, str]:
    """Return the bytes of the allocation that failed, where torch or numpy names them."""
    found = _ALLOCATION.search(str(error))
    if found is None:
        return {}
    return {"neededBytes": str(int(float(found[1]) * _UNITS[found[2]]))}
