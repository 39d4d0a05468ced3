"""The slots of ResidencyService: parse, one call of the host, convert."""

from google.protobuf.empty_pb2 import Empty

from modelhost.v1 import operations_pb2, slots_pb2
from modelhost.v1 import residency_service_pb2 as pb
from modelhostd.api import convert, convert_from, lists
from modelhostd.api.addressing import plain_model_id
from modelhostd.api.calls import Call
from modelhostd.core import names
from modelhostd.core.state import State
from modelhostd.host import Host


class SlotMethods:
    """Stable names whose model can be switched."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def _state(self) -> State:
        return self._host.registry.committed

    async def get_slot(self, request: pb.GetSlotRequest, call: Call) -> slots_pb2.Slot:
        """See GetSlot in the contract."""
        return convert.slot(self._state.slot(names.parse("slots", "name", request.name)))

    async def list_slots(self, request: pb.ListSlotsRequest, call: Call) -> pb.ListSlotsResponse:
        """See ListSlots in the contract."""
        model = plain_model_id(self._state, "model", request.model) if request.model else ""
        found = [slot for slot in self._state.slots.values() if model in ("", slot.model)]
        slots, token = lists.page(
            request, sorted(found, key=lambda s: s.id), lambda s: s.id, convert.slot
        )
        return pb.ListSlotsResponse(
            slots=slots,
            next_page_token=token,
            sequence=self._host.registry.journal.last_sequence,
            store_id=self._host.registry.store_id,
        )

    async def switch_slot(
        self, request: pb.SwitchSlotRequest, call: Call
    ) -> operations_pb2.Operation:
        """See SwitchSlot in the contract."""
        operation = await self._host.slots.switch(
            names.parse("slots", "slot", request.slot),
            plain_model_id(self._state, "model", request.model),
            etag=request.etag,
            unload_previous=request.unload_previous,
            principal=call.principal,
            request=convert_from.request(call.method, request),
        )
        return convert.operation(operation)

    async def clear_slot(self, request: pb.ClearSlotRequest, call: Call) -> Empty:
        """See ClearSlot in the contract."""
        key = names.parse("slots", "name", request.name)
        await self._host.slots.clear(key, request.etag, call.principal)
        return Empty()
