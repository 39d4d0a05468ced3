"""HostService: parse, one call of the host, convert."""

from collections.abc import AsyncIterator, Callable, Sequence

from modelhost.v1 import devices_pb2, host_pb2, settings_pb2
from modelhost.v1 import host_service_pb2 as pb
from modelhostd.api import convert, convert_from, convert_tier, convert_values, lists, masks
from modelhostd.api.calls import Call
from modelhostd.api.facts import Facts
from modelhostd.api.methods import Service
from modelhostd.api.statistics import MODELS_MAX, Statistics
from modelhostd.api.storage import StorageMethods
from modelhostd.core import names
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import Device, Settings
from modelhostd.host import Host
from modelhostd.host.import_plan import FAIL
from modelhostd.host.registry_io import DOCUMENT_BYTES_MAX, Imported

API_VERSIONS = ("modelhost.v1", "inference")

Listeners = Callable[[], Sequence[host_pb2.Host.Listener]]


def host_service(host: Host, facts: Facts, statistics: Statistics, listeners: Listeners) -> Service:
    """Return the service to offer."""
    descriptor = pb.DESCRIPTOR.services_by_name["HostService"]
    return Service(descriptor, HostService(host, facts, statistics, listeners))


class HostService(StorageMethods):
    """The host as a whole."""

    def __init__(
        self, host: Host, facts: Facts, statistics: Statistics, listeners: Listeners
    ) -> None:
        super().__init__(host, facts.home)
        self._facts = facts
        self._statistics = statistics
        self._listeners = listeners

    async def get_host(self, request: pb.GetHostRequest, call: Call) -> host_pb2.Host:
        """See GetHost in the contract."""
        facts, registry = self._facts, self._host.registry
        states = host_pb2.Host.SourceStatus.State
        return host_pb2.Host(
            name="host",
            hostname=facts.hostname,
            version=facts.version,
            api_versions=API_VERSIONS,
            python_version=facts.python_version,
            protobuf_version=facts.protobuf_version,
            grpcio_version=facts.grpcio_version,
            store_id=registry.store_id,
            sequence=registry.journal.last_sequence,
            start_time=convert_values.timestamp(self._host.start_time),
            pid=facts.pid,
            home=str(facts.home),
            listeners=self._listeners(),
            sources=[
                host_pb2.Host.SourceStatus(
                    scheme=s.scheme,
                    endpoint=s.endpoint,
                    state=states.Value(s.state),
                    message=s.message,
                    check_time=convert_values.timestamp(s.check_time),
                    has_credential=s.has_credential,
                )
                for s in facts.sources()
            ],
            credentials=[
                host_pb2.Host.Credential(
                    origin=c.origin,
                    kept_in=c.kept_in,
                    state=host_pb2.Host.Credential.State.Value(c.state),
                    message=c.message,
                )
                for c in facts.credentials()
            ],
            process_settings=[
                host_pb2.Host.ProcessSetting(
                    setting=p.setting, value=p.value, effective=p.effective, message=p.message
                )
                for p in facts.settings
            ],
            backends=[
                host_pb2.Host.Backend(
                    id=b.id,
                    version=b.version,
                    tasks=b.tasks,
                    available=b.available,
                    message=b.message,
                )
                for b in (facts.backends() if facts.backends is not None else ())
            ],
            principal=call.principal,
        )

    # --- devices --------------------------------------------------------------------------------

    async def list_devices(
        self, request: pb.ListDevicesRequest, call: Call
    ) -> pb.ListDevicesResponse:
        """See ListDevices in the contract."""
        found = sorted(self._host.registry.committed.devices.values(), key=lambda d: d.id)
        devices, token = lists.page(request, found, lambda d: d.id, self._shown)
        return pb.ListDevicesResponse(
            devices=devices,
            next_page_token=token,
            sequence=self._host.registry.journal.last_sequence,
            store_id=self._host.registry.store_id,
            host_tier=convert_tier.host_tier(self._host.occupancy.host),
        )

    async def get_device(self, request: pb.GetDeviceRequest, call: Call) -> devices_pb2.Device:
        """See GetDevice in the contract."""
        key = names.parse("devices", "name", request.name)
        return self._shown(self._host.registry.committed.device(key))

    async def update_device(
        self, request: pb.UpdateDeviceRequest, call: Call
    ) -> devices_pb2.Device:
        """See UpdateDevice in the contract."""
        key = names.parse("devices", "device.name", request.device.name)
        device = self._host.registry.committed.device(key)
        if masks.written(request.update_mask, request.device, ("budget_bytes",)):
            given = request.device
            budget = given.budget_bytes if given.HasField("budget_bytes") else None
            device = await self._host.residency.set_budget(key, budget, call.principal)
        return self._shown(device)

    def _shown(self, device: Device) -> devices_pb2.Device:
        view = self._host.occupancy.views().get(device.id)
        free = view.free_bytes if view is not None else 0
        return convert.device(self._host.live_device(device), free)

    # --- settings and figures -------------------------------------------------------------------

    async def get_settings(
        self, request: pb.GetSettingsRequest, call: Call
    ) -> settings_pb2.Settings:
        """See GetSettings in the contract."""
        return convert.settings(self._host.registry.committed.settings)

    async def update_settings(
        self, request: pb.UpdateSettingsRequest, call: Call
    ) -> settings_pb2.Settings:
        """See UpdateSettings in the contract."""
        given = request.settings
        paths = masks.written(request.update_mask, given, convert_from.WRITABLE_SETTINGS)
        configured = self._host.config.settings_over(Settings())
        settings = await self._host.update_settings(
            convert_from.settings(given, paths, configured),
            convert_from.core_names(paths),
            given.etag,
            call.principal,
        )
        return convert.settings(settings)

    async def get_statistics(
        self, request: pb.GetStatisticsRequest, call: Call
    ) -> host_pb2.Statistics:
        """See GetStatistics in the contract."""
        convert_from.few("models", request.models, MODELS_MAX)
        return self._statistics.take([names.parse("models", "models", m) for m in request.models])

    # --- the registry as a file -----------------------------------------------------------------

    async def export_registry(
        self, request: pb.ExportRegistryRequest, call: Call
    ) -> AsyncIterator[pb.ExportRegistryResponse]:
        """See ExportRegistry in the contract."""
        registry = self._host.registry
        sequence = registry.journal.last_sequence
        async for chunk in self._host.registry_io.export():
            yield pb.ExportRegistryResponse(
                chunk=chunk, sequence=sequence, store_id=registry.store_id
            )

    async def import_registry(
        self, requests: AsyncIterator[pb.ImportRegistryRequest], call: Call
    ) -> pb.ImportRegistryResponse:
        """See ImportRegistry in the contract."""
        first: pb.ImportRegistryRequest | None = None
        document = bytearray()
        async for request in requests:
            first = first or request
            document += request.chunk
            if len(document) > DOCUMENT_BYTES_MAX:
                raise ModelhostError(
                    Reason.INVALID_ARGUMENT,
                    f"the document has more than {DOCUMENT_BYTES_MAX} bytes; import it in parts",
                    {"field": "chunk", "expected": f"at most {DOCUMENT_BYTES_MAX} bytes in all"},
                )
        if first is None:
            raise invalid("chunk", "the document that ExportRegistry made", "no message")
        conflict = FAIL
        if first.conflict:
            kind = pb.ImportRegistryRequest.Conflict
            conflict = convert_from.enum("conflict", kind, first.conflict)
        # The fingerprint is of all of it: the options of the first message and the whole document.
        whole = pb.ImportRegistryRequest()
        whole.CopyFrom(first)
        whole.chunk = bytes(document)
        done = await self._host.registry_io.apply(
            await self._host.registry_io.read(bytes(document)),
            conflict=conflict,
            include_settings=first.include_settings,
            dry_run=first.dry_run,
            principal=call.principal,
            request=None if first.dry_run else convert_from.request(call.method, whole),
        )
        return self._imported(done)

    def _imported(self, done: Imported) -> pb.ImportRegistryResponse:
        def named(models: Sequence[str]) -> Sequence[str]:
            return [convert_values.named("models", m) for m in models]

        return pb.ImportRegistryResponse(
            created_models=named(done.created),
            updated_models=named(done.updated),
            skipped_models=named(done.skipped),
            slots=[convert_values.named("slots", slot) for slot in done.slots],
            settings_changed=done.settings_changed,
            sequence=self._host.registry.journal.last_sequence,
            store_id=self._host.registry.store_id,
        )
