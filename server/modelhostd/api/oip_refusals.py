"""RPCs of the protocol that are not offered, in the forms in which clients call them at their start."""

from modelhost.oip import open_inference_pb2
from modelhostd.api.calls import Call
from modelhostd.core.errors import ModelhostError, Reason

_oip = open_inference_pb2


class Refusals:
    """Shared memory of clients, traces and logs: lists are empty, the rest is UNIMPLEMENTED for good."""

    async def system_shared_memory_status(
        self, request: _oip.SystemSharedMemoryStatusRequest, call: Call
    ) -> _oip.SystemSharedMemoryStatusResponse:
        """List no regions: none can be registered."""
        return _oip.SystemSharedMemoryStatusResponse()

    async def system_shared_memory_unregister(
        self, request: _oip.SystemSharedMemoryUnregisterRequest, call: Call
    ) -> _oip.SystemSharedMemoryUnregisterResponse:
        """Do nothing: nothing is registered."""
        return _oip.SystemSharedMemoryUnregisterResponse()

    async def system_shared_memory_register(
        self, request: _oip.SystemSharedMemoryRegisterRequest, call: Call
    ) -> _oip.SystemSharedMemoryRegisterResponse:
        """Refuse."""
        raise _not_offered(call, "named shared memory is not taken; send raw_input_contents")

    async def cuda_shared_memory_status(
        self, request: _oip.CudaSharedMemoryStatusRequest, call: Call
    ) -> _oip.CudaSharedMemoryStatusResponse:
        """List no regions: none can be registered."""
        return _oip.CudaSharedMemoryStatusResponse()

    async def cuda_shared_memory_unregister(
        self, request: _oip.CudaSharedMemoryUnregisterRequest, call: Call
    ) -> _oip.CudaSharedMemoryUnregisterResponse:
        """Do nothing: nothing is registered."""
        return _oip.CudaSharedMemoryUnregisterResponse()

    async def cuda_shared_memory_register(
        self, request: _oip.CudaSharedMemoryRegisterRequest, call: Call
    ) -> _oip.CudaSharedMemoryRegisterResponse:
        """Refuse."""
        raise _not_offered(call, "CUDA memory of others is not taken; send raw_input_contents")

    async def trace_setting(
        self, request: _oip.TraceSettingRequest, call: Call
    ) -> _oip.TraceSettingResponse:
        """Refuse: it would let a caller write files."""
        raise _not_offered(call, "a caller cannot have traces written")

    async def log_settings(
        self, request: _oip.LogSettingsRequest, call: Call
    ) -> _oip.LogSettingsResponse:
        """Refuse: it would let a caller write files."""
        raise _not_offered(call, "set log_level with modelhost.v1 HostService.UpdateSettings")


def _not_offered(call: Call, why: str) -> ModelhostError:
    method = call.method.rpartition("/")[2]
    return ModelhostError(
        Reason.UNIMPLEMENTED, f"{method} is not offered: {why}", {"method": method}
    )
