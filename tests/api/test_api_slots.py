"""Slots over the wire: switched, listed, used by clients of both protocols, cleared."""

from pathlib import Path

import grpc

from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import model_service_pb2, operations_pb2
from modelhost.v1 import residency_service_pb2 as pb
from tests.api.support import CALL_S, failure, served

NAME = "models/minilm"


async def test_a_slot_is_a_name_for_a_model(tmp_path: Path) -> None:
    """What a switch made is shown, listed and valid where a model's name is; cleared it is gone."""
    async with served(tmp_path) as it:
        await it.have()
        request = pb.SwitchSlotRequest(slot="slots/role", model=NAME, request_id="once")
        operation = await it.tcp.residency.SwitchSlot(request, timeout=CALL_S)
        done = await it.end(operation)
        assert done.kind == operations_pb2.Operation.SWITCH
        assert done.switch_result == operations_pb2.SwitchResult(slot="slots/role", model=NAME)
        again = await it.tcp.residency.SwitchSlot(request, timeout=CALL_S)
        assert again.name == operation.name
        slot = await it.tcp.residency.GetSlot(pb.GetSlotRequest(name="slots/role"), timeout=CALL_S)
        assert (slot.model, slot.etag) == (NAME, "1")
        for model, count in (("", 1), (NAME, 1)):
            listed = await it.tcp.residency.ListSlots(pb.ListSlotsRequest(model=model))
            assert len(listed.slots) == count
        by_slot = model_service_pb2.GetModelRequest(name="models/role")
        assert (await it.tcp.models.GetModel(by_slot, timeout=CALL_S)).name == NAME
        ready = it.tcp.raw("/inference.GRPCInferenceService/ModelReady")
        answer = await ready(oip.ModelReadyRequest(name="role").SerializeToString())
        assert oip.ModelReadyResponse.FromString(answer).ready
        clear = pb.ClearSlotRequest(name="slots/role", etag=slot.etag)
        await it.tcp.residency.ClearSlot(clear, timeout=CALL_S)
        found = await failure(it.tcp.residency.GetSlot(pb.GetSlotRequest(name="slots/role")))
        assert (found.reason, found.code) == ("SLOT_NOT_FOUND", grpc.StatusCode.NOT_FOUND)


async def test_a_slot_takes_no_model_s_name(tmp_path: Path) -> None:
    """Models and slots share one namespace, whichever comes first."""
    async with served(tmp_path) as it:
        await it.have()
        switch = pb.SwitchSlotRequest(slot="slots/role", model=NAME)
        await it.end(await it.tcp.residency.SwitchSlot(switch, timeout=CALL_S))
        create = model_service_pb2.CreateModelRequest(model_id="role")
        create.model.source.uri = "hf://org/role"
        assert (await failure(it.tcp.models.CreateModel(create))).reason == "ALREADY_EXISTS"
        slot_for_slot = pb.SwitchSlotRequest(slot="slots/other", model="models/role")
        found = await failure(it.tcp.residency.SwitchSlot(slot_for_slot))
        assert found.reason == "MODEL_NOT_FOUND"
