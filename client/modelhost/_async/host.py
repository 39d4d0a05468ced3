"""The host: devices, settings, figures, storage, the registry as a file."""
# ruff: noqa: ASYNC109 - a timeout is sent with the call, so that the daemon keeps it, too

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from modelhost import _calls, _enums, _masks, _names
from modelhost._async.operations import PAGE_SIZE, AsyncOperationHandle, AsyncOperations
from modelhost._progress import Report
from modelhost.v1 import (
    devices_pb2,
    event_service_pb2,
    host_pb2,
    host_service_pb2,
    models_pb2,
    settings_pb2,
    storage_pb2,
)

IMPORT_CHUNK_BYTES = 192 * 1024

Conflict = host_service_pb2.ImportRegistryRequest.Conflict


class AsyncHost(AsyncOperations):
    """What ``AsyncClient`` does with the host as a whole."""

    async def host(self) -> host_pb2.Host:
        """Return versions, addresses, backends, and the sources that the host reaches."""
        return await self._transport.unary(
            self._transport.host.GetHost, host_service_pb2.GetHostRequest()
        )

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Return SERVING, NOT_SERVING or UNKNOWN for a service's full name; empty = the daemon.

        It is grpc.health.v1's answer. Raises NotFound for an unknown service.
        """
        return await self._transport.health(service, timeout)

    async def devices(self) -> list[devices_pb2.Device]:
        """List devices by name, with what is used of them."""
        request = host_service_pb2.ListDevicesRequest(page_size=PAGE_SIZE)
        found: list[devices_pb2.Device] = []
        while True:
            page = await self._transport.unary(self._transport.host.ListDevices, request)
            found.extend(page.devices)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def host_tier(self) -> devices_pb2.HostTier:
        """Return what weights may take of host memory beside devices, and what they do.

        Its budget is the setting ``host_budget_bytes``.
        """
        request = host_service_pb2.ListDevicesRequest(page_size=1)
        return (await self._transport.unary(self._transport.host.ListDevices, request)).host_tier

    async def device(self, device: str) -> devices_pb2.Device:
        """Return one device, by id or name. Raises NotFound."""
        request = host_service_pb2.GetDeviceRequest(name=_names.device_name(device))
        return await self._transport.unary(self._transport.host.GetDevice, request)

    async def set_budget(self, device: str, budget_bytes: int | None) -> devices_pb2.Device:
        """Set the bytes that modelhost may use of a device, from 1; None = back to the default.

        Acts at once and is kept; interrupts nothing. Needs the operator's right. Raises BudgetTooSmall, and
        changes nothing, below what pins and leases hold there.
        """
        request = host_service_pb2.UpdateDeviceRequest(
            device=devices_pb2.Device(name=_names.device_name(device), budget_bytes=budget_bytes),
        )
        request.update_mask.paths.append("budget_bytes")
        return await self._transport.unary(self._transport.host.UpdateDevice, request)

    async def settings(self) -> settings_pb2.Settings:
        """Return the settings as they act now."""
        return await self._transport.unary(
            self._transport.host.GetSettings, host_service_pb2.GetSettingsRequest()
        )

    async def update_settings(
        self, changes: Mapping[str, Any], *, etag: str = ""
    ) -> settings_pb2.Settings:
        """Change settings, at once and all or none; None = back to what the configuration says.

        Needs the operator's right. Raises Conflict where ``etag`` is given and not current, BudgetTooSmall (of
        host memory).
        """
        changed = settings_pb2.Settings(etag=etag)
        mask = _masks.fill(changed, changes)
        request = host_service_pb2.UpdateSettingsRequest(settings=changed, update_mask=mask)
        return await self._transport.unary(self._transport.host.UpdateSettings, request)

    async def statistics(self, models: Iterable[str] = ()) -> host_pb2.Statistics:
        """Return the figures of this moment; ``models`` narrows instances and operations."""
        request = host_service_pb2.GetStatisticsRequest(models=_names.model_names(models))
        return await self._transport.unary(self._transport.host.GetStatistics, request)

    async def watch_statistics(
        self, interval: float = 1.0, models: Iterable[str] = ()
    ) -> AsyncIterator[host_pb2.Statistics]:
        """Yield the figures of this moment, then whenever they changed, at most every ``interval`` seconds.

        From 0.25 to 60 s; a slow reader gets the latest. Ends when the daemon stops.
        """
        request = event_service_pb2.WatchStatisticsRequest(models=_names.model_names(models))
        request.interval.FromNanoseconds(round(interval * 1e9))
        stream = self._transport.stream(self._transport.events.WatchStatistics, request)
        try:
            while (found := await stream.read()) is not None:
                yield found
        finally:
            stream.cancel()

    async def storage(self) -> storage_pb2.Storage:
        """Return what the disk is used for."""
        return await self._transport.unary(
            self._transport.host.GetStorage, host_service_pb2.GetStorageRequest()
        )

    async def check_storage(
        self,
        *,
        deep: bool = False,
        repair: bool = False,
        wait: bool = True,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> AsyncOperationHandle:
        """Compare registry and disk; ``operation.check_storage_result`` lists the differences.

        ``deep`` hashes every file; ``repair`` mends what can be without loss. Needs the operator's right.
        """
        request = host_service_pb2.CheckStorageRequest(deep=deep, repair=repair)
        operation = await self._transport.unary(self._transport.host.CheckStorage, request)
        return await self._handle(operation, wait=wait, progress=progress, timeout=timeout)

    async def prune_storage(
        self,
        *,
        dry_run: bool = False,
        wait: bool = True,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> AsyncOperationHandle:
        """Remove files that no model needs, or only say how much. Needs the operator's right."""
        request = host_service_pb2.PruneStorageRequest(dry_run=dry_run)
        operation = await self._transport.unary(self._transport.host.PruneStorage, request)
        return await self._handle(operation, wait=wait, progress=progress, timeout=timeout)

    async def quarantine(self, model: str | None = None) -> list[storage_pb2.QuarantinedFile]:
        """List files that were not what was promised, the newest first, all or one model's."""
        request = host_service_pb2.ListQuarantineRequest(
            model=_names.model_name(model) if model else "", page_size=PAGE_SIZE
        )
        found: list[storage_pb2.QuarantinedFile] = []
        while True:
            page = await self._transport.unary(self._transport.host.ListQuarantine, request)
            found.extend(page.quarantined_files)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def restore_quarantined(self, file: str) -> models_pb2.Model:
        """Declare a quarantined file right: its model's next download takes it as it is.

        Nothing checks it again. Needs the operator's right. Raises InvalidArgument, NotFound.
        """
        request = host_service_pb2.RestoreQuarantinedRequest(name=_names.quarantined_name(file))
        return await self._transport.unary(self._transport.host.RestoreQuarantined, request)

    async def delete_quarantined(self, file: str) -> None:
        """Delete a quarantined file for good; one that is gone is no error. Needs the operator's right."""
        request = host_service_pb2.DeleteQuarantinedRequest(name=_names.quarantined_name(file))
        await self._transport.unary(self._transport.host.DeleteQuarantined, request)

    async def export_registry(self, *, timeout: float | None = None) -> bytes:
        """Return the registry as one JSON document: models, slots, settings; no files."""
        stream = self._transport.stream(
            self._transport.host.ExportRegistry,
            host_service_pb2.ExportRegistryRequest(),
            timeout or self._transport.options.timeout,
        )
        chunks: list[bytes] = []
        while (part := await stream.read()) is not None:
            chunks.append(part.chunk)
        return b"".join(chunks)

    async def import_registry(
        self,
        document: bytes,
        *,
        conflict: str = "FAIL",
        include_settings: bool = False,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> host_service_pb2.ImportRegistryResponse:
        """Register the models of a document of ``export_registry``, all or none; fetch no files.

        ``conflict`` says what happens to an id that is taken: FAIL, SKIP or UPDATE. ``dry_run`` only says
        what would be done. Needs the operator's right. Raises AlreadyExists, InvalidArgument.
        """
        head = host_service_pb2.ImportRegistryRequest(
            conflict=_enums.number_of(Conflict, conflict, "conflict"),
            include_settings=include_settings,
            dry_run=dry_run,
            request_id=_calls.make_request_id(),
        )
        return await self._transport.upload(
            self._transport.host.ImportRegistry,
            _chunks(head, document),
            "ImportRegistry",
            timeout,
        )


def _chunks(
    head: host_service_pb2.ImportRegistryRequest, document: bytes
) -> Iterator[host_service_pb2.ImportRegistryRequest]:
    """Yield a document in messages, of which the first says what holds for all."""
    head.chunk = document[:IMPORT_CHUNK_BYTES]
    yield head
    for at in range(IMPORT_CHUNK_BYTES, len(document), IMPORT_CHUNK_BYTES):
        chunk = document[at : at + IMPORT_CHUNK_BYTES]
        yield host_service_pb2.ImportRegistryRequest(chunk=chunk)
