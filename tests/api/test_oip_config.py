"""RepositoryModelLoad with ``config``: the model's config is changed, and what is loaded is so with it."""

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import OperationKind
from tests.api.oip_scene import OipScene, oip_scene, request
from tests.api.serving import info_of
from tests.host.support import World
from tests.support import DEADLINE_S, wait_until_async


class Once(dict[str, ModelhostError]):
    """Errors of which each is raised once."""

    def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
        """Return an error that is not there afterwards."""
        return self.pop(key, default)  # type: ignore[arg-type]


async def load(at: OipScene, config: object) -> None:
    """Load the model with a config, given as text or as what becomes JSON."""
    asked = oip.RepositoryModelLoadRequest(model_name="a")
    text = config if isinstance(config, str) else json.dumps(config)
    asked.parameters["config"].string_param = text
    await at.stub.RepositoryModelLoad(asked)


async def refused(at: OipScene, config: object) -> tuple[str, str]:
    """Return the field that a config is refused for, and the message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await load(at, config)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    message = caught.value.details() or ""
    assert message.startswith("load failed for model 'a': ")
    return info_of(caught.value).metadata["field"], message


def reloads(at: OipScene) -> int:
    """Return how many reloads there were."""
    return sum(o.kind is OperationKind.RELOAD for o in at.run.host.operations.list())


async def test_a_config_is_taken_up_by_a_load(tmp_path: Path) -> None:
    """What is not loaded is loaded with it; a model that is, is reloaded if what changed asks for that."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        await load(at, {"max_batch_size": 8, "keep_alive": "90s"})
        config = at.run.host.models.get("a").config
        assert (config.max_batch_size, config.keep_alive_s) == (8, 90.0)
        assert reloads(at) == 0
        await load(at, {"maxBatchSize": 4})
        assert at.run.host.models.get("a").config.max_batch_size == 4
        assert reloads(at) == 1
        instance = at.run.host.registry.committed.instance_of("a")
        assert instance is not None
        assert not instance.config_stale
        # Live, and the same again: nothing to reload for.
        await load(at, {"priority": 3, "max_batch_size": 4})
        assert at.run.host.models.get("a").config.priority == 3
        assert reloads(at) == 1
        await load(at, {"max_batch_size": None})
        assert at.run.host.models.get("a").config.max_batch_size is None
        assert reloads(at) == 2


async def test_what_model_config_answers_may_come_back(tmp_path: Path) -> None:
    """A client takes the whole configuration, changes what both sides know, and loads with that."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        answer = await at.stub.ModelConfig(oip.ModelConfigRequest(name="a"))
        whole = json_format.MessageToDict(answer.config, preserving_proto_field_name=True)
        assert {"name", "platform", "input", "output", "instance_group"} <= whole.keys()
        await load(at, whole)
        whole["dynamic_batching"] = {"max_queue_delay_microseconds": "1500"}
        await load(at, whole)
        config = at.run.host.models.get("a").config
        assert (config.dynamic_batching, config.max_batch_delay_s) == (True, 0.0015)
        whole["input"][0]["data_type"] = "TYPE_FP16"
        field, message = await refused(at, whole)
        assert field == "parameters[config].input"
        assert "TYPE_FP16" in message
        field, _ = await refused(at, {"name": "b"})
        assert field == "parameters[config].name"


async def test_a_config_that_cannot_be_loaded_is_taken_back(tmp_path: Path) -> None:
    """The load fails with why; the config is what it was, and a model that was loaded comes back with that."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        await load(at, {"max_batch_size": 4})
        broken = ModelhostError(Reason.LOAD_FAILED, "no", {"model": "a", "backend": "identity"})
        at.run.workers.load_errors = Once(a=broken)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await load(at, {"max_batch_size": 8, "backend_options": {"x": 1}})
        assert caught.value.details() == "load failed for model 'a': no"
        config = at.run.host.models.get("a").config
        assert (config.max_batch_size, config.backend_options) == (4, {})
        assert (await at.infer(request())).model_name == "a"


async def test_a_config_is_taken_back_for_a_client_that_gave_up_too(tmp_path: Path) -> None:
    """The load goes on without it, and what the model could not be loaded with is not what stays."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        await load(at, {"max_batch_size": 4})
        gate = at.run.workers.load_gate("a")
        gate.close()
        asked = oip.RepositoryModelLoadRequest(model_name="a")
        asked.parameters[
            "config"
        ].string_param = '{"max_batch_size": 8, "backend_options": {"x": 1}}'
        call = at.stub.RepositoryModelLoad(asked)
        await gate.reached()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await wait_until_async(lambda: not at.serving.calls, DEADLINE_S)
        assert at.run.host.models.get("a").config.max_batch_size == 8
        at.run.workers.crash("sim-0")
        broken = ModelhostError(Reason.LOAD_FAILED, "no", {"model": "a", "backend": "identity"})
        at.run.workers.load_errors = Once(a=broken)
        gate.open()
        await wait_until_async(
            lambda: at.run.host.models.get("a").config.max_batch_size == 4, DEADLINE_S
        )
        assert at.run.host.models.get("a").config.backend_options == {}
        assert (await at.infer(request())).model_name == "a"


async def test_a_config_for_which_there_is_no_room_now_stays(tmp_path: Path) -> None:
    """What failed for another reason is not taken back: it is what the next load takes."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        lost = ModelhostError(Reason.WORKER_LOST, "gone", {"model": "a"})
        at.run.workers.load_errors["a"] = lost
        with pytest.raises(grpc.aio.AioRpcError):
            await load(at, {"max_batch_size": 8})
        assert at.run.host.models.get("a").config.max_batch_size == 8


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ("", "parameters[config]"),
        ("[1]", "parameters[config]"),
        ("{" * 100_000, "parameters[config]"),
        ("[" * 100_000, "parameters[config]"),
        ('{"no_such": 1}', "parameters[config].no_such"),
        ('{"max_batch_size": "many"}', "parameters[config].max_batch_size"),
        ('{"max_batch_size": 1e99}', "parameters[config].max_batch_size"),
        ('{"max_batch_size": 0}', "parameters[config].max_batch_size"),
        ('{"maxBatchSize": -1}', "parameters[config].maxBatchSize"),
        ('{"device": "devices/none"}', "parameters[config].device"),
        ('{"device": "none"}', "parameters[config].device"),
        ('{"keepAlive": "99999999999s"}', "parameters[config].keepAlive"),
        ('{"fallbackModel": "models/a"}', "parameters[config].fallbackModel"),
        ('{"keep_alive": NaN}', "parameters[config].keep_alive"),
        ('{"dynamic_batching": {"preserve_ordering": true}}',
         "parameters[config].dynamic_batching.preserve_ordering"),
        ('{"dynamic_batching": {"max_queue_delay_microseconds": 10000001}}',
         "parameters[config].dynamic_batching.max_queue_delay_microseconds"),
        ('{"dynamicBatching": {"maxQueueDelayMicroseconds": "soon"}}',
         "parameters[config].dynamicBatching.maxQueueDelayMicroseconds"),
        ('{"backend_options": ' + '{"a":' * 40 + "1" + "}" * 41,
         "parameters[config].backend_options"),
        ('{"response_cache": {"enable": true}}', "parameters[config].response_cache"),
        ('{"\\ud800": 1}', "parameters[config]"),
        ('{"dynamic_batching": {"\\ud800": 1}}', "parameters[config]"),
        ('{"input": [{"\\ud800": 1}]}', "parameters[config]"),
    ],
    ids=range(22),
)  # fmt: skip
async def test_a_config_that_is_wrong_changes_nothing(
    tmp_path: Path, config: str, field: str
) -> None:
    """INVALID_ARGUMENT names the field, whatever the text holds; the model is as it was."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        before = at.run.host.models.get("a")
        found, message = await refused(at, config)
        assert found == field
        assert message.startswith(f"load failed for model 'a': {field}: expected ")
        assert "no_such" not in config or message.endswith("got 'no_such'")
        assert at.run.host.models.get("a") == before


async def test_a_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """It comes as string_param."""
    async with oip_scene(World(tmp_path)) as at:
        await at.run.have("a")
        asked = oip.RepositoryModelLoadRequest(model_name="a")
        asked.parameters["config"].bytes_param = b"{}"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await at.stub.RepositoryModelLoad(asked)
        assert info_of(caught.value).metadata["field"] == "parameters[config]"
