"""What the protocol has and modelhost does not: asked for politely it is answered, used it is refused."""

from pathlib import Path

import grpc
import pytest

from modelhost.oip import open_inference_pb2 as oip
from tests.api.oip_scene import OipScene, oip_scene
from tests.api.serving import info_of
from tests.host.support import World


async def refused(at: OipScene, method: str, **fields: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(at.stub, method)(getattr(oip, f"{method}Request")(**fields))
    return caught.value


@pytest.mark.parametrize("kind", ["System", "Cuda"])
async def test_shared_memory_is_as_with_a_server_that_has_no_region(
    tmp_path: Path, kind: str
) -> None:
    """All regions are none, one by name is not found, taking any away succeeds; registering is refused."""
    async with oip_scene(World(tmp_path)) as at:
        status = getattr(at.stub, f"{kind}SharedMemoryStatus")
        assert not (await status(getattr(oip, f"{kind}SharedMemoryStatusRequest")())).regions
        error = await refused(at, f"{kind}SharedMemoryStatus", name="mine")
        assert error.code() is grpc.StatusCode.NOT_FOUND
        words = f"Unable to find {kind.lower()} shared memory region: 'mine'"
        assert error.details() == words
        assert info_of(error).reason == "REGION_NOT_FOUND"
        forget = getattr(at.stub, f"{kind}SharedMemoryUnregister")
        for name in ("", "mine"):
            await forget(getattr(oip, f"{kind}SharedMemoryUnregisterRequest")(name=name))
        error = await refused(at, f"{kind}SharedMemoryRegister", name="mine", byte_size=8)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "raw_input_contents" in (error.details() or "")


async def test_nothing_is_traced_and_nobody_can_have_it(tmp_path: Path) -> None:
    """The level is OFF, for all and for a model; a setting is refused, an unknown model not found."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        for model in ("", "a"):
            answer = await at.stub.TraceSetting(oip.TraceSettingRequest(model_name=model))
            assert {k: list(v.value) for k, v in answer.settings.items()} == {
                "trace_level": ["OFF"]
            }
        error = await refused(at, "TraceSetting", model_name="nobody")
        assert error.code() is grpc.StatusCode.NOT_FOUND
        settings = {"trace_file": oip.TraceSettingRequest.SettingValue(value=["/etc/passwd"])}
        error = await refused(at, "TraceSetting", settings=settings)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_log_is_told_of_and_set_elsewhere(tmp_path: Path) -> None:
    """Triton's settings say what log_level says; to change them is refused with where to do it."""
    async with oip_scene(World(tmp_path)) as at:
        answer = await at.stub.LogSettings(oip.LogSettingsRequest())
        told = {k: getattr(v, v.WhichOneof("parameter_choice")) for k, v in answer.settings.items()}
        assert told == {
            "log_error": True,
            "log_warning": True,
            "log_info": True,
            "log_verbose_level": 0,
            "log_file": "",
            "log_format": "default",
        }
        settings = {"log_file": oip.LogSettingsRequest.SettingValue(string_param="/etc/passwd")}
        error = await refused(at, "LogSettings", settings=settings)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "UpdateSettings" in (error.details() or "")


async def test_a_name_that_no_log_can_hold_is_shown_with_escapes_once_quoted(
    tmp_path: Path,
) -> None:
    """A model, a region and a parameter that nobody knows stand between one pair of quotes."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        for name, shown in (("no\nsuch", r"no\nsuch"), ("No/Such", "No/Such")):
            error = await refused(at, "RepositoryModelLoad", model_name=name)
            assert (error.details() or "").startswith(f"failed to load '{shown}', failed to poll")
            error = await refused(at, "ModelReady", name=name)
            assert error.details() == f"Request for unknown model: '{shown}' is not found"
            error = await refused(at, "SystemSharedMemoryStatus", name=name)
            assert error.details() == f"Unable to find system shared memory region: '{shown}'"
        parameters = {"x\ny": oip.ModelRepositoryParameter(bool_param=True)}
        error = await refused(at, "RepositoryModelLoad", model_name="a", parameters=parameters)
        assert error.details() == r"unrecognized load parameter 'x\ny'."
        assert info_of(error).metadata["field"] == r"parameters[x\ny]"
