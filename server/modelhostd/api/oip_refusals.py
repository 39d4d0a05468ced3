"""Shared memory, traces and logs: what clients ask of them is answered, what would change anything is refused.

Clients call some of these at their start, to see what there is and to clean up.
"""

import logging

from modelhost.oip import open_inference_pb2
from modelhostd.api.calls import Call
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.names import shown
from modelhostd.host import Host

_oip = open_inference_pb2


class Refusals:
    """No region is registered, nothing is traced; registering and setting is UNIMPLEMENTED for good."""

    _host: Host

    async def system_shared_memory_status(
        self, request: _oip.SystemSharedMemoryStatusRequest, call: Call
    ) -> _oip.SystemSharedMemoryStatusResponse:
        """List no regions: none can be registered."""
        _check_region("system", request.name)
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
        _check_region("cuda", request.name)
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
        """Say that nothing is traced, for a model or for all; refuse to: it would write files."""
        if request.settings:
            raise _not_offered(call, "a caller cannot have traces written")
        if request.model_name:
            self._host.inference.model_for(request.model_name)
        answer = _oip.TraceSettingResponse()
        answer.settings["trace_level"].value.append("OFF")
        return answer

    async def log_settings(
        self, request: _oip.LogSettingsRequest, call: Call
    ) -> _oip.LogSettingsResponse:
        """Say what is logged, in Triton's words; refuse to change it here."""
        if request.settings:
            raise _not_offered(call, "set log_level with modelhost.v1 HostService.UpdateSettings")
        level = logging.getLevelName(self._host.registry.committed.settings.log_level.upper())
        answer = _oip.LogSettingsResponse()
        for name in ("error", "warning", "info"):
            answer.settings[f"log_{name}"].bool_param = level <= logging.getLevelName(name.upper())
        answer.settings["log_verbose_level"].uint32_param = int(level <= logging.DEBUG)
        answer.settings["log_file"].string_param = ""
        answer.settings["log_format"].string_param = "default"
        return answer


def _check_region(kind: str, name: str) -> None:
    """Raise REGION_NOT_FOUND for one by name: Triton's clients look for these words."""
    if name:
        raise ModelhostError(
            Reason.REGION_NOT_FOUND,
            f"Unable to find {kind} shared memory region: '{shown(name)}'",
            {"region": shown(name)},
        )


def _not_offered(call: Call, why: str) -> ModelhostError:
    method = call.method.rpartition("/")[2]
    return ModelhostError(
        Reason.UNIMPLEMENTED, f"{method} is not offered: {why}", {"method": method}
    )
