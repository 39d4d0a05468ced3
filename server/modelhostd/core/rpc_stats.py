"""Counts of calls by method: what Prometheus knows as go-grpc's server metrics.

Counting is on the way of every request, so it is a few additions on plain numbers; names and texts are
made when somebody looks. Source of names and meanings:
https://github.com/grpc-ecosystem/go-grpc-middleware/tree/main/providers/prometheus
"""

from collections.abc import Iterator

from modelhostd.core.histogram import Histogram

BOUNDS_S = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0),
)
"""Upper bounds of the buckets, seconds. go-grpc's begin at 5 ms, where most calls here have ended."""

UNKNOWN = "_unknown"
"""Stands for every name that is not ours, so that callers cannot make labels."""

OK = 0


class MethodCounts:
    """The calls of one method. ``handled`` has them by gRPC's code, ``seconds`` by how long they took.

    ``kind`` is go-grpc's: unary, client_stream, server_stream or bidi_stream.
    """

    __slots__ = ("handled", "kind", "method", "seconds", "service", "started")

    def __init__(self, service: str, method: str, kind: str) -> None:
        self.service = service
        self.method = method
        self.kind = kind
        self.started = 0
        self.handled: dict[int, int] = {}
        self.seconds = Histogram(BOUNDS_S)

    def begin(self) -> None:
        """Count a call that has come in."""
        self.started += 1

    def end(self, code: int, seconds: float) -> None:
        """Count a call that has ended with a gRPC code after so many seconds; errors count too."""
        self.handled[code] = self.handled.get(code, 0) + 1
        self.seconds.add(seconds)


class RpcStats:
    """The calls of every method that is offered; one object for all listeners."""

    def __init__(self) -> None:
        self._methods: dict[str, MethodCounts] = {}
        self.unknown = MethodCounts(UNKNOWN, UNKNOWN, "unary")
        """Calls of methods that nobody offers."""

    def method(self, path: str, kind: str) -> MethodCounts:
        """Return the counts of the method at gRPC's path ``/package.Service/Method``, made if new."""
        counts = self._methods.get(path)
        if counts is None:
            service, _, name = path.removeprefix("/").partition("/")
            counts = self._methods[path] = MethodCounts(service, name, kind)
        return counts

    def __iter__(self) -> Iterator[MethodCounts]:
        yield from self._methods.values()
        if self.unknown.started:
            yield self.unknown


def kind_of(*, client_streaming: bool, server_streaming: bool) -> str:
    """Return go-grpc's word for what streams."""
    if client_streaming:
        return "bidi_stream" if server_streaming else "client_stream"
    return "server_stream" if server_streaming else "unary"
