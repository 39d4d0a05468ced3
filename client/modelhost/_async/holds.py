"""Leases and slots: a client's hold on a model, and names whose model can be switched."""
# ruff: noqa: ASYNC109 - a timeout is sent with the call, so that the daemon keeps it, too

from types import TracebackType
from typing import Self

from google.protobuf.duration_pb2 import Duration

from modelhost import _names
from modelhost._arguments import checked
from modelhost._async.operations import PAGE_SIZE, AsyncOperationHandle, AsyncOperations
from modelhost._async.transport import AsyncTransport
from modelhost._progress import Report
from modelhost.v1 import residency_service_pb2, slots_pb2


@checked
class AsyncLease:
    """A hold on a model: it is not evicted until the lease is released or its time is up.

    ::

        async with await client.lease("e5", seconds=300) as lease:
            ...  # longer work: now and then ``await lease.renew(300)``

    Leaving the block releases it. It does not load the model, and ends with the daemon.
    """

    def __init__(self, transport: AsyncTransport, lease: slots_pb2.Lease) -> None:
        self._transport = transport
        self._lease = lease

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} of {self.model}>"

    @property
    def name(self) -> str:
        """The resource name, ``leases/{lease}``."""
        return self._lease.name

    @property
    def model(self) -> str:
        """The model that is held, ``models/{model}``."""
        return self._lease.model

    @property
    def lease(self) -> slots_pb2.Lease:
        """The lease as it was last seen: its holder, and when it ends."""
        return self._lease

    async def renew(self, seconds: float = 60.0) -> slots_pb2.Lease:
        """Let it last ``seconds`` (1 to 86,400) from now. Raises NotFound when it has ended."""
        request = residency_service_pb2.RenewLeaseRequest(
            name=self.name, time_to_live=_duration(seconds)
        )
        self._lease = await self._transport.unary(self._transport.residency.RenewLease, request)
        return self._lease

    async def release(self) -> None:
        """End it; one that has ended is no error."""
        request = residency_service_pb2.ReleaseLeaseRequest(name=self.name)
        await self._transport.unary(self._transport.residency.ReleaseLease, request)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.release()


class AsyncHolds(AsyncOperations):
    """What ``AsyncClient`` does with leases and slots."""

    async def lease(self, model: str, seconds: float = 60.0) -> AsyncLease:
        """Forbid a model's eviction for ``seconds`` (1 to 86,400); it is not loaded by that."""
        request = residency_service_pb2.AcquireLeaseRequest(
            model=_names.model_name(model), time_to_live=_duration(seconds)
        )
        lease = await self._transport.unary(self._transport.residency.AcquireLease, request)
        return AsyncLease(self._transport, lease)

    async def slots(self, model: str | None = None) -> list[slots_pb2.Slot]:
        """List slots by name, all or those that stand for ``model``."""
        request = residency_service_pb2.ListSlotsRequest(
            model=_names.model_name(model) if model else "", page_size=PAGE_SIZE
        )
        found: list[slots_pb2.Slot] = []
        while True:
            page = await self._transport.unary(self._transport.residency.ListSlots, request)
            found.extend(page.slots)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def slot(self, slot: str) -> slots_pb2.Slot:
        """Return one slot, by id or name. Raises NotFound."""
        request = residency_service_pb2.GetSlotRequest(name=_names.slot_name(slot))
        return await self._transport.unary(self._transport.residency.GetSlot, request)

    async def switch(
        self,
        slot: str,
        model: str,
        *,
        etag: str = "",
        unload_previous: bool = False,
        wait: bool = True,
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> AsyncOperationHandle:
        """Load a model and make a slot stand for it; the slot is made where there is none.

        Requests go to the old model, or wait, until the new one is loaded; none is refused. With ``etag`` only
        if the slot still has it. At its end the operation has ``switch_result``. Raises as ``load`` does, and
        PreconditionFailed where the slot has changed.
        """
        request = residency_service_pb2.SwitchSlotRequest(
            slot=_names.slot_name(slot),
            model=_names.model_name(model),
            etag=etag,
            unload_previous=unload_previous,
        )
        operation = await self._transport.unary(self._transport.residency.SwitchSlot, request)
        return await self._handle(operation, wait=wait, progress=progress, timeout=timeout)

    async def clear_slot(self, slot: str, *, etag: str = "") -> None:
        """Remove a slot; its model stays as it is. Raises NotFound."""
        request = residency_service_pb2.ClearSlotRequest(name=_names.slot_name(slot), etag=etag)
        await self._transport.unary(self._transport.residency.ClearSlot, request)


def _duration(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made
