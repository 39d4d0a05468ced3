"""One call as the metrics see it: counted in when it comes, out with its code when its outcome is known."""

import time
from typing import Any

import grpc

from modelhostd.api.methods import Method
from modelhostd.core.errors import Code
from modelhostd.core.rpc_stats import MethodCounts, RpcStats, kind_of


def counts_of(method: Method, stats: RpcStats) -> MethodCounts:
    """Return where calls of a method are counted."""
    kind = kind_of(
        client_streaming=method.client_streaming, server_streaming=method.server_streaming
    )
    return stats.method(method.path, kind)


class Counted:
    """Counts its call in at once. ``code`` is what it will be counted out with: gRPC's number.

    Until somebody says otherwise that is CANCELLED: nobody does when the client is gone.
    """

    __slots__ = ("_context", "_counts", "code", "started")

    def __init__(self, counts: MethodCounts, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        self.started = time.monotonic()
        self.code: int = Code.CANCELLED
        self._counts = counts
        self._context = context
        counts.begin()

    def end(self) -> None:
        """Count the call out."""
        code = self.code
        if code == Code.CANCELLED:
            # The end of the caller's own deadline reaches a handler as a cancellation, too.
            remaining: float | None = self._context.time_remaining()
            if remaining is not None and remaining <= 0.0:
                code = Code.DEADLINE_EXCEEDED
        self._counts.end(code, time.monotonic() - self.started)
