"""modelhost: many models on few GPUs, one daemon, gRPC.

Everything is imported when it is first used, so that ``import modelhost`` is cheap: grpc, numpy and
protobuf come with the first client. The contract's messages are in ``modelhost.v1``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelhost._async.client import AsyncClient
    from modelhost._async.events import AsyncWatch
    from modelhost._async.generation import AsyncTextStream
    from modelhost._async.holds import AsyncLease
    from modelhost._async.operations import AsyncOperationHandle
    from modelhost._batch import Outcome
    from modelhost._errors import (
        AlreadyExists,
        BudgetTooSmall,
        Cancelled,
        Code,
        Conflict,
        DataLoss,
        Internal,
        InvalidArgument,
        ModelhostError,
        NotFound,
        OutOfMemory,
        OutOfRange,
        PermissionDenied,
        PreconditionFailed,
        QueueFull,
        ResourceExhausted,
        Timeout,
        Unavailable,
        Unimplemented,
        Unreachable,
    )
    from modelhost._freshness import Compared, Freshness
    from modelhost._generation import Generation, Sampling
    from modelhost._inference import Classification, Label
    from modelhost._sync.client import Client
    from modelhost._sync.events import Watch
    from modelhost._sync.generation import TextStream
    from modelhost._sync.holds import Lease
    from modelhost._sync.operations import OperationHandle
    from modelhost._watch import Reset, WatchItem

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncLease",
    "AsyncOperationHandle",
    "AsyncTextStream",
    "AsyncWatch",
    "BudgetTooSmall",
    "Cancelled",
    "Classification",
    "Client",
    "Code",
    "Compared",
    "Conflict",
    "DataLoss",
    "Freshness",
    "Generation",
    "Internal",
    "InvalidArgument",
    "Label",
    "Lease",
    "ModelhostError",
    "NotFound",
    "OperationHandle",
    "OutOfMemory",
    "OutOfRange",
    "Outcome",
    "PermissionDenied",
    "PreconditionFailed",
    "QueueFull",
    "Reset",
    "ResourceExhausted",
    "Sampling",
    "TextStream",
    "Timeout",
    "Unavailable",
    "Unimplemented",
    "Unreachable",
    "Watch",
    "WatchItem",
    "__version__",
]

_HOMES = {
    "AsyncClient": "modelhost._async.client",
    "AsyncLease": "modelhost._async.holds",
    "AsyncOperationHandle": "modelhost._async.operations",
    "AsyncTextStream": "modelhost._async.generation",
    "AsyncWatch": "modelhost._async.events",
    "Classification": "modelhost._inference",
    "Client": "modelhost._sync.client",
    "Compared": "modelhost._freshness",
    "Freshness": "modelhost._freshness",
    "Generation": "modelhost._generation",
    "Label": "modelhost._inference",
    "Lease": "modelhost._sync.holds",
    "OperationHandle": "modelhost._sync.operations",
    "Outcome": "modelhost._batch",
    "Reset": "modelhost._watch",
    "Sampling": "modelhost._generation",
    "TextStream": "modelhost._sync.generation",
    "Watch": "modelhost._sync.events",
    "WatchItem": "modelhost._watch",
}

__version__: str


def __getattr__(name: str) -> Any:
    """Import what is asked for, once (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("modelhost")
    elif name in __all__:
        value = getattr(importlib.import_module(_HOMES.get(name, "modelhost._errors")), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
