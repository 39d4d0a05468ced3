"""GRPCInferenceService: the Open Inference Protocol v2 with Triton's extensions.

ModelInfer is the hot path: bytes come in, the fields to route by are scanned, the bytes go to the worker, and
its bytes go out. The daemon never parses a tensor; the worker checks the whole message.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing

from modelhost.oip import open_inference_pb2
from modelhost.v1 import options_pb2
from modelhostd.api import oip_answers, oip_stream
from modelhostd.api.admission import Group
from modelhostd.api.calls import Call
from modelhostd.api.methods import Service
from modelhostd.api.oip_refusals import Refusals
from modelhostd.api.oip_repository import FILES_REFUSED, Repository
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.oip_scan import RequestHead, scan
from modelhostd.core.values import dataclass
from modelhostd.host import Host
from modelhostd.ports import InferReply

_oip = open_inference_pb2

PRIORITY_DEFAULT = 100
"""How urgent a request without ``priority`` is: requests count from 1, the most urgent, upwards."""

WINDOW_BYTES = 64 * 1024
"""What a call's window takes at least, whether its client reads or not."""

PAUSE_BYTES = 4 * 1024 * 1024
"""Requests from this size on let others have a turn of the loop before they are copied to the worker: gRPC has copied
them twice in the same turn, and each copy of 16 MiB takes 2 ms."""

_READ = (
    *("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig"),
    *("ModelStatistics", "RepositoryIndex"),
    *("SystemSharedMemoryStatus", "SystemSharedMemoryUnregister"),
    *("CudaSharedMemoryStatus", "CudaSharedMemoryUnregister"),
    *("TraceSetting", "LogSettings"),
)
_OPERATE = (
    "SystemSharedMemoryRegister",
    "CudaSharedMemoryRegister",
)
RIGHTS: Mapping[str, int] = {
    **dict.fromkeys(_READ, options_pb2.READ),
    **dict.fromkeys(("ModelInfer", "ModelStreamInfer"), options_pb2.INFER),
    **dict.fromkeys(("RepositoryModelLoad", "RepositoryModelUnload"), options_pb2.MANAGE),
    **dict.fromkeys(_OPERATE, options_pb2.OPERATE),
}
_WAITING = ("ModelMetadata", "ModelConfig", "RepositoryModelLoad", "RepositoryModelUnload")
"""They wait for a model to come or go, which the model's own limits bound."""


@dataclass(frozen=True, slots=True)
class InferenceOptions:
    """What the operator sets. ``server_name``: some clients look for ``triton``."""

    server_name: str = "modelhost"
    server_version: str = "0"
    message_bytes_max: int = 64 * 1024 * 1024
    in_flight_bytes_max: int = 512 * 1024 * 1024
    """Bytes of all requests that are not answered yet, and of all answers that are not read yet; at least
    one message fits."""


def inference_service(host: Host, options: InferenceOptions) -> Service:
    """Return the service to offer."""
    infer = ("ModelInfer", "ModelStreamInfer")
    return Service(
        _oip.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        InferenceService(host, options),
        rights=RIGHTS,
        raw=frozenset(infer),
        groups={"ModelInfer": Group.INFERENCE, **dict.fromkeys(_WAITING, Group.STREAM)},
        limits=dict.fromkeys(infer, options.message_bytes_max),
        timeouts=dict.fromkeys(("ModelInfer", *_WAITING)),
        too_large={"RepositoryModelLoad": FILES_REFUSED},
    )


class ByteBudget:
    """The bytes of all models' requests in flight, or of their answers: ``what`` says which."""

    def __init__(self, limit: int, what: str = "requests in flight") -> None:
        self.limit = limit
        self.used = 0
        self._what = what

    def set_limit(self, limit: int) -> None:
        """Change the limit for requests that come from now on."""
        self.limit = limit

    def take(self, size: int, model: str) -> None:
        """Count a request in, or raise QUEUE_FULL."""
        if self.used + size > self.limit:
            raise ModelhostError(
                Reason.QUEUE_FULL,
                f"{self._what} hold {self.used} bytes, {size} more are above the limit of "
                f"{self.limit}; try again in a second",
                {"model": model, "queue": str(self.used), "limit": str(self.limit)},
                retry_delay_s=1.0,
            )
        self.used += size

    def give_back(self, size: int) -> None:
        """Count a request out."""
        self.used -= size


class InferenceService(Repository, Refusals):
    """See GRPCInferenceService in the contract."""

    def __init__(self, host: Host, options: InferenceOptions) -> None:
        super().__init__(host)
        self._options = options
        limit = max(options.in_flight_bytes_max, options.message_bytes_max)
        self.budget = ByteBudget(limit)
        # Apart: clients that do not read must not keep others' requests out.
        self.unread = ByteBudget(limit, "answers that their clients have not read")

    def set_limit(self, limit: int) -> None:
        """Change how many bytes may be in flight, and how many unread, from now on."""
        self.budget.set_limit(limit)
        self.unread.set_limit(limit)

    # --- inference ------------------------------------------------------------------------------

    async def model_infer(self, request: bytes, call: Call) -> bytes:
        """Route one encoded ModelInferRequest and return the worker's encoded answer."""
        head = scan(request)
        answer = await self.infer(head, request, call)
        self.count_unread(head.model_name, len(answer), call)
        return answer

    def count_unread(self, model: str, size: int, call: Call) -> None:
        """Count the bytes of a call's answer until its client has them, or raise QUEUE_FULL."""
        # gRPC holds what is above a window until the client reads it, long after a method has returned.
        if size > WINDOW_BYTES:
            self.unread.take(size, model[:64])
            # The task's end, not the context's: gRPC keeps a context that has callbacks until the collector comes by.
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda _: self.unread.give_back(size))

    def model_stream_infer(
        self, requests: AsyncIterator[bytes], call: Call
    ) -> AsyncIterator[bytes]:
        """Answer many requests over one stream."""

        def infer(
            head: RequestHead, request: bytes
        ) -> AsyncGenerator[tuple[bool, InferReply], None]:
            return self.stream(head, request, call)

        return oip_stream.answers(requests, infer, self.unread, call)

    async def stream(
        self, head: RequestHead, request: bytes, call: Call
    ) -> AsyncGenerator[tuple[bool, InferReply], None]:
        """Route one encoded ModelInferRequest; see :meth:`modelhostd.host.inference.Inference.stream`."""
        size = len(request)
        self.budget.take(size, head.model_name[:64])
        try:
            if size >= PAUSE_BYTES:
                await asyncio.sleep(0)
            replies = self._host.inference.stream(
                head.model_name,
                head.model_version,
                request,
                _timeout_s(call.remaining_s(), head.timeout_us),
                _priority(head.priority),
            )
            async with aclosing(replies):
                async for reply in replies:
                    yield reply
        finally:
            self.budget.give_back(size)

    async def infer(self, head: RequestHead, request: bytes, call: Call) -> bytes:
        """Route one encoded ModelInferRequest, counted in the budget, and return the worker's encoded answer."""
        size = len(request)
        self.budget.take(size, head.model_name[:64])
        try:
            if size >= PAUSE_BYTES:
                await asyncio.sleep(0)
            reply = await self._host.inference.infer(
                head.model_name,
                head.model_version,
                request,
                _timeout_s(call.remaining_s(), head.timeout_us),
                _priority(head.priority),
            )
        finally:
            self.budget.give_back(size)
        return reply.payload

    # --- the server -----------------------------------------------------------------------------

    async def server_live(
        self, request: _oip.ServerLiveRequest, call: Call
    ) -> _oip.ServerLiveResponse:
        """Say that the daemon runs."""
        return _oip.ServerLiveResponse(live=True)

    async def server_ready(
        self, request: _oip.ServerReadyRequest, call: Call
    ) -> _oip.ServerReadyResponse:
        """Say whether requests are taken; loading models do not matter."""
        return _oip.ServerReadyResponse(ready=self._host.inference.accepting)

    async def server_metadata(
        self, request: _oip.ServerMetadataRequest, call: Call
    ) -> _oip.ServerMetadataResponse:
        """Say what the server is and which extensions it has."""
        return _oip.ServerMetadataResponse(
            name=self._options.server_name,
            version=self._options.server_version,
            extensions=oip_answers.EXTENSIONS,
        )

    # --- models ---------------------------------------------------------------------------------

    async def model_ready(
        self, request: _oip.ModelReadyRequest, call: Call
    ) -> _oip.ModelReadyResponse:
        """Say whether a request would be served now."""
        ready = self._host.inference.ready(request.name, request.version)
        return _oip.ModelReadyResponse(ready=ready)

    async def model_metadata(
        self, request: _oip.ModelMetadataRequest, call: Call
    ) -> _oip.ModelMetadataResponse:
        """Say what a model takes and gives, loading it as a request would."""
        route, loaded = await self.loaded(request.name, request.version, call)
        return oip_answers.metadata(request.name, route, loaded)

    async def model_config(
        self, request: _oip.ModelConfigRequest, call: Call
    ) -> _oip.ModelConfigResponse:
        """Say how a model is configured, loading it as a request would."""
        config = await self.config(request.name, request.version, call)
        return _oip.ModelConfigResponse(config=config)

    async def model_statistics(
        self, request: _oip.ModelStatisticsRequest, call: Call
    ) -> _oip.ModelStatisticsResponse:
        """Return counts and times, which never fall while a model is loaded."""
        return oip_answers.statistics(self._host, request.name, request.version)


def _timeout_s(remaining_s: float | None, timeout_us: int) -> float | None:
    """Return the seconds that a request has: its call's, or less where its ``timeout`` says so."""
    if not timeout_us:
        return remaining_s
    own = timeout_us / 1e6
    return own if remaining_s is None else min(own, remaining_s)


def _priority(asked: int) -> int:
    """Return a request's priority as workers take it: higher goes first, 0 is that of one without."""
    return PRIORITY_DEFAULT - min(asked or PRIORITY_DEFAULT, 2 * PRIORITY_DEFAULT)
