"""The composition root: builds the adapters, the host and the servers, starts and stops them in order.

The only module that knows all of them. Start: registry, workers' listener, listeners, READY. Stop, each
step with a deadline and the whole with one: refuse, last bookmarks, calls in flight, downloads, workers,
database. A second signal ends the wait for calls in flight.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

import grpc

from modelhostd import config_load, process
from modelhostd._version import __version__
from modelhostd.adapters import logs, memory
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.clock import SystemClock
from modelhostd.adapters.database import FILE_NAME, SqliteDatabase
from modelhostd.adapters.devices import MachineDevices
from modelhostd.adapters.downloads import SourceDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.hub_cache import HubCache
from modelhostd.adapters.hub_publish import HubPublisher
from modelhostd.adapters.notify import Notifier
from modelhostd.adapters.transfer import StreamConfig
from modelhostd.adapters.trees import TreeStore
from modelhostd.adapters.uploads import UploadStore
from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.adapters.workers.supervisor import ProcessWorkers
from modelhostd.api.facts import Backend, CredentialStatus, SourceStatus
from modelhostd.api.server import ApiConfig, ApiServer, build
from modelhostd.config import Config
from modelhostd.config_values import ConfigError
from modelhostd.core.errors import ModelhostError
from modelhostd.core.host_tier import default_budget_bytes
from modelhostd.core.resources import Event, Kind, Settings
from modelhostd.core.tallies import Tallies
from modelhostd.core.tasks import BACKEND_PACKAGES, BACKEND_TASKS
from modelhostd.gateway.gateway import Gateway
from modelhostd.gateway.sources import Sources
from modelhostd.host import Host, HostConfig
from modelhostd.host.registry import History
from modelhostd.process import ProcessSetting
from modelhostd.source_setup import SourceSetup

log = logs.get_logger(__name__)

EXIT_STUCK = 75
TICK_S = 5.0
BACKUP_S = 300.0


def run(config: Config, arguments: argparse.Namespace, settings: Sequence[ProcessSetting]) -> int:
    """Serve until SIGTERM or SIGINT; the home's lock is held by the caller. Returns the exit code."""
    logs.configure(config.log_level, config.log_format)
    given = config.downloads
    tokens = (given.token, given.github_token, given.gs_token)
    for secret in (*tokens, given.s3_secret, given.s3_session):
        if secret is not None:
            logs.hide(secret.value)
    factory, loop_setting = process.loop_factory(config.uvloop)
    daemon = Daemon(config, arguments, (*settings, loop_setting))
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(daemon.serve())


class Daemon:
    """Everything that one process is made of."""

    def __init__(
        self, config: Config, arguments: argparse.Namespace, settings: Sequence[ProcessSetting]
    ) -> None:
        self.config = config
        self._arguments = arguments
        self._settings = settings
        self._notifier = Notifier.from_environment()
        self._stop = asyncio.Event()
        self._store = BlobStore(StoreConfig(home=config.home))
        trees = TreeStore(self._store)
        self._files = FileStore(self._store, trees)
        self._setup = SourceSetup(config.downloads)
        cache, publishes = config.downloads.cache, config.downloads.cache_publish
        self._downloads = SourceDownloads(
            self._setup.adapters,
            self._store,
            trees,
            streams=StreamConfig(connections=config.downloads.connections),
            deadline_s=config.downloads.deadline_s,
            cache=HubCache(cache) if cache else None,
            publisher=HubPublisher(cache, self._store) if publishes and cache else None,
        )
        self._database = SqliteDatabase(config.home / FILE_NAME)
        self._workers = ProcessWorkers(_workers_config(config))
        self.host = Host(
            _host_config(config),
            clock=SystemClock(),
            database=self._database,
            devices=MachineDevices(config.devices.sim_bytes),
            downloads=self._downloads,
            uploads=UploadStore(self._store, trees),
            files=self._files,
            workers=self._workers,
        )
        self._backed_up = 0
        self._api: ApiServer | None = None
        self._gateway: Gateway | None = None

    async def serve(self) -> int:
        """Start, wait for a signal, stop. Raises ModelhostError when it cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        # What the last run left half-done, before a download could take it for its own.
        await self._files.recover()
        await self.host.start()
        self.host.registry.subscribe(self._published)
        logs.set_level(self.host.registry.committed.settings.log_level)
        tallies = Tallies(self.host.registry.committed.models.values())
        self.host.registry.subscribe(tallies.fold)
        try:
            self._api = build(self.host, self._api_config())
            self._gateway = self._make_gateway(self._api, tallies)
            urls = [self._gateway.listen()] if self._gateway is not None else []
            await self._api.start()
        except BaseException:
            await self._stop_parts(grace_s=0.0)
            raise
        self._announce([*self._api.addresses, *urls])
        if self._gateway is not None:
            self._gateway.start()
        tasks = [
            asyncio.create_task(self._stay_alive(), name="watchdog"),
            asyncio.create_task(self._keep_backup(), name="backup"),
        ]
        await self._stop.wait()
        for task in tasks:
            task.cancel()
        await self._shut_down()
        return 0

    # --- stopping -------------------------------------------------------------------------------

    def _on_stop(self) -> None:
        if self._stop.is_set() and self._api is not None:
            log.info("asked to stop once more: calls in flight are not waited for")
            self._api.hurry()
        self._stop.set()

    async def _shut_down(self) -> None:
        shutdown = self.config.shutdown
        total = shutdown.drain_timeout_s + shutdown.worker_timeout_s + shutdown.exit_timeout_s
        log.info("stopping", deadline_s=total)
        self._notifier.stopping("draining")
        self._notifier.extend_timeout(total)
        # Even a loop that is stuck must not keep the process: this thread does not depend on it. It goes
        # with the process, since what comes after the last step (tasks, threads) may be stuck as well.
        last_resort = threading.Timer(total, os._exit, (EXIT_STUCK,))
        last_resort.daemon = True
        last_resort.start()
        await self._stop_parts(shutdown.drain_timeout_s)
        log.info("stopped")

    async def _stop_parts(self, grace_s: float) -> None:
        self.host.inference.stop()
        if self._api is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s + 5.0):
                    await self._api.stop(grace_s)
        if self._gateway is not None:
            # After the api: while that drains, /healthz says so.
            await self._gateway.stop()
        await self.host.stop(grace_s=1.0)
        await self._back_up()
        await self._workers.stop(self.config.shutdown.worker_timeout_s)
        await self.host.close()
        self._store.close()
        self._notifier.close()

    # --- while it runs --------------------------------------------------------------------------

    def _announce(self, addresses: Sequence[str]) -> None:
        self._notifier.ready(f"serving on {', '.join(addresses)}")
        process.begin_collecting()
        log.info("serving", addresses=list(addresses), home=str(self.config.home))
        if sys.stderr.isatty() or os.environ.get("MODELHOST_BANNER"):
            sys.stderr.write(_banner(self.config, addresses))

    async def _stay_alive(self) -> None:
        """Tell the service manager that the daemon works, as long as it does."""
        interval = self._notifier.ping_interval_s
        while interval is not None:
            await asyncio.sleep(interval)
            try:
                async with asyncio.timeout(interval):
                    await self._database.read_events(1, 0)
            except (TimeoutError, ModelhostError):
                log.error("the database does not answer")
                continue
            if self.host.residency.ticked_within(TICK_S):
                self._notifier.alive()

    async def _keep_backup(self) -> None:
        """Keep a copy of the registry beside the database, and give freed memory back meanwhile."""
        while True:
            await asyncio.sleep(BACKUP_S)
            await self._back_up()
            process.release_memory()

    async def _back_up(self) -> None:
        sequence = self.host.registry.journal.last_sequence
        if sequence == self._backed_up:
            return
        from modelhostd.adapters.backup import write_backup  # here: not a part of the start

        try:
            await write_backup(self.config.home, self.host.registry_io.export())
            self._backed_up = sequence
        except OSError as error:
            log.warning("the registry's copy could not be written", error=str(error))

    def _published(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind is Kind.SETTINGS and isinstance(event.resource, Settings):
                logs.set_level(event.resource.log_level)

    def _on_hangup(self) -> None:
        task = asyncio.ensure_future(self._reload())
        task.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def _reload(self) -> None:
        """Take up what changed in the configuration and can change while running."""
        self._notifier.reloading()
        try:
            found = config_load.reload(self.config, self._arguments)
            self.config = found.config
            for error in await self.host.reconfigure(_host_config(found.config)):
                log.error("a configured budget is not taken up", error=str(error), **error.metadata)
            if self._api is not None:
                self._api.set_limits(found.config.limits)
            log.info("configuration reloaded", live=found.live, needs_restart=found.restart)
        except (ConfigError, ModelhostError) as error:
            log.error("the configuration stays as it was", error=str(error))
        finally:
            self._notifier.ready()

    def _make_gateway(self, api: ApiServer, tallies: Tallies) -> Gateway | None:
        address = self.config.http_address
        if address is None:
            return None
        sources = Sources(
            self.host,
            api.rpc_stats,
            tallies,
            build={
                "version": __version__,
                "python_version": ".".join(map(str, sys.version_info[:3])),
                "grpcio_version": grpc.__version__,
            },
            subscriber_count=api.gauges.subscriber_count,
            inference_bytes=api.gauges.inference_bytes,
            worker_pids=self._workers.pids,
        )
        return Gateway(address, sources, lambda: api.health.serving)

    def _api_config(self) -> ApiConfig:
        config = self.config
        return ApiConfig(
            addresses=config.addresses,
            admin_socket=config.admin_socket,
            socket_mode=int(config.socket_mode, 8),
            loopback_is_operator=config.loopback_is_operator,
            limits=config.limits,
            settings=self._settings,
            home=config.home,
            version=__version__,
            server_name=config.server_name,
            backends=self._backends,
            sources=self._sources,
            credentials=self._credentials,
            installed=_installed,
            daemon_bytes=lambda: memory.resident_bytes([os.getpid()]),
        )

    def _backends(self) -> Sequence[Backend]:
        """Return the backends that the operator allowed; what they serve is known of our own."""
        return [_backend(name) for name, _ in _workers_config(self.config).allowed_backends()]

    def _sources(self) -> Sequence[SourceStatus]:
        """Return the sources that this daemon can ask, and what became of the last question."""
        statuses = []
        for scheme, endpoint in self._setup.offered.items():
            contact = self._downloads.contact_with(scheme)
            statuses.append(
                SourceStatus(
                    scheme,
                    endpoint,
                    contact.state,
                    contact.message,
                    contact.time,
                    has_credential=self._setup.has_credential(scheme),
                )
            )
        return statuses

    def _credentials(self) -> Sequence[CredentialStatus]:
        """Return what may be shown of the credentials for sources."""
        return [
            CredentialStatus(known.origin, known.kept_in, known.state, known.message)
            for known in self._setup.credentials.known()
        ]


def _backend(name: str) -> Backend:
    """Return what can be told of a backend without importing it: what it serves, and what it lacks."""
    missing = [p for p in BACKEND_PACKAGES.get(name, ()) if not _installed(p)]
    why = f"missing packages: {', '.join(missing)}" if missing else ""
    tasks = sorted(BACKEND_TASKS.get(name, ("*",)))
    return Backend(name, tasks, _installed(name), available=not missing, message=why)


def _installed(package: str) -> str:
    """Return the version of an installed package, or an empty text."""
    # Here: with what it brings (email) it is a twentieth of the daemon's start.
    from importlib import metadata

    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def _host_config(config: Config) -> HostConfig:
    found = memory.read()
    return HostConfig(
        budgets=config.budgets,
        host_default_bytes=default_budget_bytes(found.total_bytes, found.available_bytes),
        settings_over=config.settings_over,
        history=History(count=config.events.count, age_s=config.events.age_s),
        keep_operations=config.operations.count,
        keep_operations_s=config.operations.age_s,
        downloads_per_host=config.downloads.per_host,
        health_interval_s=config.worker.health_interval_s,
    )


def _workers_config(config: Config) -> WorkersConfig:
    return WorkersConfig(
        backends=config.worker.backends,
        arena_bytes=config.worker.arena_bytes,
        host_ready_bytes=config.worker.host_ready_bytes,
        max_message_bytes=config.limits.inference_message_bytes,
        start_timeout_s=config.worker.start_timeout_s,
        hang_timeout_s=config.worker.hang_timeout_s,
        compute_threads=config.worker.threads,
        log_level=config.log_level,
    )


def _banner(config: Config, addresses: Sequence[str]) -> str:
    listening = "\n".join(f"  {address}" for address in addresses)
    return (
        f"\nmodelhost is serving on\n{listening}\n"
        f"its state is in {config.home}\n\n"
        "in another terminal, try\n"
        "  modelhost status\n"
        "  modelhost pull hf://sentence-transformers/all-MiniLM-L6-v2\n"
        "  modelhost infer all-minilm-l6-v2 'a first sentence'\n"
        "  modelhost events -f\n\n"
        "Ctrl-C ends it.\n"
    )
