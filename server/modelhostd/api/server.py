"""The gRPC servers: one for each listener, all on one loop, with one registry of calls.

``build(host, config)`` makes an ApiServer; ``start()`` binds and serves, ``stop(grace_s)`` drains and ends.
Nothing here is specific to a service: those come as ``Service`` values.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import structlog

from modelhost.v1 import host_pb2
from modelhostd.api.admission import Admission, AdmissionLimits
from modelhostd.api.calls import Calls
from modelhostd.api.compatibility import Compatibility
from modelhostd.api.compression import Unpacker
from modelhostd.api.events import EventService, event_service
from modelhostd.api.facts import Backend, CredentialStatus, Facts, ProcessSetting, SourceStatus
from modelhostd.api.health import Health, health_service
from modelhostd.api.hosts import host_service
from modelhostd.api.inference import InferenceOptions, InferenceService, inference_service
from modelhostd.api.listeners import Address, Listener, listeners
from modelhostd.api.methods import Service
from modelhostd.api.models import model_service
from modelhostd.api.operations import operation_service
from modelhostd.api.reflection import reflection_services
from modelhostd.api.residency import residency_service
from modelhostd.api.statistics import Gauges, Statistics
from modelhostd.api.tasks import task_service
from modelhostd.api.wrapper import Wrapper
from modelhostd.core.rpc_stats import RpcStats
from modelhostd.core.values import dataclass
from modelhostd.host import Host

log = structlog.get_logger(__name__)

SERVER_STOP_S = 2.0
LAST_WORD_S = 2.0
STEP_S = 3.0
"""How long a step of stopping may take beyond what it is given."""

TYPED_REFUSAL_BYTES = 1024 * 1024
"""gRPC's own limit stands this much above ours: what is a little too large gets a typed error."""


class Limits(Protocol):
    """What one client may cost the others; see Limits in the configuration."""

    @property
    def inference_message_bytes(self) -> int:
        """Largest inference message."""

    @property
    def control_message_bytes(self) -> int:
        """Largest request of any other method."""

    @property
    def inference_bytes_in_flight(self) -> int:
        """Inference requests held at one time."""

    @property
    def max_connections(self) -> int:
        """Connections of each listener."""

    @property
    def max_concurrent_streams(self) -> int:
        """Calls at one time on one connection."""

    @property
    def max_unary_calls(self) -> int:
        """Control calls at one time."""

    @property
    def max_inference_calls(self) -> int:
        """Inference calls at one time."""

    @property
    def max_streams(self) -> int:
        """Watches and other streams at one time."""


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """What the composition root says. ``socket_mode`` is of the users' unix sockets."""

    addresses: Sequence[Address]
    admin_socket: Path | None
    limits: Limits
    home: Path
    version: str
    socket_mode: int = 0o660
    loopback_is_operator: bool = True
    settings: Sequence[ProcessSetting] = ()
    sources: Callable[[], Sequence[SourceStatus]] = tuple
    credentials: Callable[[], Sequence[CredentialStatus]] = tuple
    backends: Callable[[], Sequence[Backend]] | None = None
    installed: Callable[[str], str] | None = None
    daemon_bytes: Callable[[], int] = lambda: 0
    server_name: str = "modelhost"

    def facts(self) -> Facts:
        """Return what GetHost shows."""
        return Facts(
            version=self.version,
            home=self.home,
            settings=self.settings,
            sources=self.sources,
            credentials=self.credentials,
            backends=self.backends,
            installed=self.installed,
            daemon_bytes=self.daemon_bytes,
        )


def build(host: Host, config: ApiConfig) -> "ApiServer":
    """Return the server of a host that has started. Raises WRONG_STATE for an address it must not use."""
    facts = config.facts()
    gauges = Gauges(daemon_bytes=facts.daemon_bytes)
    server = ApiServer(
        config.limits,
        listeners(
            config.addresses, config.admin_socket, config.socket_mode, config.loopback_is_operator
        ),
        Health(host),
        gauges,
    )
    statistics = Statistics(host, gauges)
    events = event_service(host, statistics)
    inference = inference_service(
        host,
        InferenceOptions(
            server_name=config.server_name,
            server_version=config.version,
            message_bytes_max=config.limits.inference_message_bytes,
            in_flight_bytes_max=config.limits.inference_bytes_in_flight,
        ),
    )
    if isinstance(events.servicer, EventService):
        watching = events.servicer
        gauges.subscriber_count = lambda: watching.watcher_count
    oip = inference.servicer
    assert isinstance(oip, InferenceService)
    gauges.inference_bytes = lambda: oip.budget.used
    server.inference_limit = oip.set_limit
    compatibility = Compatibility(host, facts.installed, facts.backend_tasks)
    # gRPC asks them in this order for each call, the one with the most calls first.
    server.services = (
        inference,
        task_service(host, oip, config.limits.inference_message_bytes, lambda: server.addresses),
        model_service(host, compatibility),
        residency_service(host),
        operation_service(host),
        events,
        host_service(host, facts, statistics, server.shown_listeners),
    )
    return server


class ApiServer:
    """The servers of all listeners. ``services`` are set before ``start``."""

    def __init__(
        self, limits: Limits, found: Sequence[Listener], health: Health, gauges: Gauges
    ) -> None:
        self.calls = Calls()
        self.admission = Admission(admission_limits(limits))
        self.health = health
        self.gauges = gauges
        self.services: Sequence[Service] = ()
        self.rpc_stats = RpcStats()
        self.inference_limit: Callable[[int], None] = lambda limit: None
        self._unpacker = Unpacker()
        self._limits = limits
        self._listeners = found
        self._started: list[Listener] = []

    @property
    def addresses(self) -> Sequence[str]:
        """Where clients reach it: ``127.0.0.1:7411``, ``unix:/run/...``."""
        return [listener.address for listener in self._started]

    def shown_listeners(self) -> Sequence[host_pb2.Host.Listener]:
        """Return the listeners as GetHost shows them."""
        roles = host_pb2.Host.Listener.Role
        return [
            host_pb2.Host.Listener(address=started.address, role=roles.Value(started.role))
            for started in self._started
        ]

    def set_limits(self, limits: Limits) -> None:
        """Take up the limits that act without a restart: how many calls may be under way."""
        self.admission.limits = admission_limits(limits)
        self.inference_limit(limits.inference_bytes_in_flight)

    async def start(self) -> None:
        """Bind every listener, then serve. Raises WRONG_STATE for an address that cannot be had; then
        none is left bound.
        """
        self.health.offer([service.name for service in self.services])
        try:
            for listener in self._listeners:
                listener.server = grpc.aio.server(options=_options(self._limits))
                self._started.append(listener)
                listener.bind()
                self._add_handlers(listener)
            for listener in self._started:
                await listener.server.start()
        except BaseException:
            await self._stop_servers()
            raise
        self.health.set_serving(True)

    def _add_handlers(self, listener: Listener) -> None:
        services = [*self.services, health_service(self.health)]
        if listener.reflection:
            services += reflection_services([s.name for s in services])
        wrapper = Wrapper(
            listener.caller,
            self.calls,
            self.admission,
            stats=self.rpc_stats,
            unpacker=self._unpacker,
        )
        listener.server.add_generic_rpc_handlers(
            wrapper.handlers(services, self._limits.control_message_bytes)
        )

    # --- stopping -------------------------------------------------------------------------------

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, end streams with their last word, let the rest end within ``grace_s``.

        Ends within ``grace_s`` and a few seconds whatever clients do.
        """
        self.health.set_serving(False)
        self.calls.draining.set()
        # Who reads has had its last word by then; who does not would hold up the others for nothing.
        last_word_s = min(grace_s, LAST_WORD_S)
        if not await self.calls.wait_idle(last_word_s):
            self.calls.let_writers_go()
        if not await self.calls.wait_idle(grace_s - last_word_s):
            left = self.calls.cancel_all()
            log.warning("calls were cut off", count=len(left), methods=sorted(set(left))[:10])
            await self.calls.wait_idle(STEP_S)
        await self._stop_servers()

    def hurry(self) -> None:
        """Give up on the calls that ``stop`` waits for: they are told that the daemon goes."""
        self.calls.let_writers_go()
        self.calls.cancel_all()

    async def _stop_servers(self) -> None:
        started, self._started = self._started, []
        stops = [asyncio.ensure_future(one.server.stop(SERVER_STOP_S)) for one in started]
        if stops:
            _, late = await asyncio.wait(stops, timeout=SERVER_STOP_S + STEP_S)
            for stop in late:
                stop.cancel()
            if late:
                log.warning("a server did not stop in time", count=len(late))
        for one in started:
            one.clean()


def admission_limits(limits: Limits) -> AdmissionLimits:
    """Return how many calls of each group may be under way."""
    return AdmissionLimits(
        control=limits.max_unary_calls,
        inference=limits.max_inference_calls,
        stream=limits.max_streams,
    )


def _options(limits: Limits) -> Sequence[tuple[str, Any]]:
    """Return gRPC's options for every server: what each guards against stands beside it."""
    largest = max(limits.inference_message_bytes, limits.control_message_bytes)
    return [
        ("grpc.so_reuseport", 0),  # a second daemon on the same port, without a word
        ("grpc.max_concurrent_streams", limits.max_concurrent_streams),  # rapid reset
        # Those that ended and are not freed yet: with gRPC's default 67 of 200 calls at once were refused.
        ("grpc.http2.max_deallocating_streams", limits.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", 5_000),  # connections that say nothing
        ("grpc.max_metadata_size", 8_192),
        ("grpc.absolute_max_metadata_size", 16_384),
        ("grpc.keepalive_time_ms", 60_000),  # peers that are gone without a word
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),  # our own clients ping, too
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_idle_ms", 900_000),
        ("grpc.max_connection_age_ms", 3_600_000),  # ends streams that nobody reads
        ("grpc.max_connection_age_grace_ms", 30_000),
        # One per server; the limit of each method is checked on the bytes that come.
        ("grpc.max_receive_message_length", min(2**31 - 1, largest + TYPED_REFUSAL_BYTES)),
        ("grpc.max_send_message_length", -1),
        ("grpc.per_message_decompression", 0),  # 60 KB to the largest message, times all calls
    ]
