"""The daemon's double, and both clients on it."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from google.protobuf import empty_pb2

from modelhost import AsyncClient, Client
from modelhost.cli.app import app
from modelhost.v1 import (
    host_pb2,
    host_service_pb2,
    model_service_pb2,
    operation_service_pb2,
    residency_service_pb2,
    settings_pb2,
    slots_pb2,
    storage_pb2,
)
from tests.client.double import Double
from tests.client.told import DEVICE, DONE, INSTANCE, MODEL, RUNNING


@pytest.fixture
def double(tmp_path: Path) -> Iterator[Double]:
    """A double on a unix socket."""
    daemon = Double(f"unix:{tmp_path}/d.sock").start()
    yield daemon
    daemon.stop()


@pytest.fixture
def client(double: Double) -> Iterator[Client]:
    """A client of the double that repeats nothing."""
    with Client(double.target, retries=False) as made:
        yield made


Both = Callable[[Callable[[Any], Any]], Any]


@pytest.fixture(params=["sync", "async"])
def both(request: pytest.FixtureRequest, double: Double) -> Both:
    """Run a call on a client of either kind: ``both(lambda c: c.get("a"))``.

    An asynchronous iterator comes back as a list, and a synchronous one, too.
    """

    def run_sync(call: Callable[[Any], Any]) -> Any:
        with Client(double.target, retries=False) as made:
            result = call(made)
            return list(result) if inspect.isgenerator(result) else result

    async def run_async(call: Callable[[Any], Any]) -> Any:
        async with AsyncClient(double.target, retries=False) as made:
            result = call(made)
            if inspect.isasyncgen(result):
                return [item async for item in result]
            return await result if inspect.isawaitable(result) else result

    if request.param == "sync":
        return run_sync
    return lambda call: asyncio.run(run_async(call))


@pytest.fixture
def run(double: Double):
    """Run the command on the double: ``run("ls", "--json")``."""

    def invoke(*arguments: str, **options) -> Result:
        return CliRunner().invoke(app, ["--target", double.target, *arguments], **options)

    return invoke


@pytest.fixture
def told(double: Double) -> Double:
    """A double with one model, loaded, on one device."""
    double.on("ListModels", model_service_pb2.ListModelsResponse(models=[MODEL]))
    double.on("GetModel", MODEL)
    double.on("ListInstances", residency_service_pb2.ListInstancesResponse(instances=[INSTANCE]))
    double.on("ListDevices", host_service_pb2.ListDevicesResponse(devices=[DEVICE]))
    double.on("GetDevice", DEVICE)
    double.on("UpdateDevice", DEVICE)
    double.on("GetSettings", settings_pb2.Settings())
    double.on("UpdateSettings", settings_pb2.Settings())
    double.on("GetHost", host_pb2.Host(version="9.9", hostname="box", pid=7, sequence=40))
    double.on("ListOperations", operation_service_pb2.ListOperationsResponse(operations=[RUNNING]))
    for method in (
        "DownloadModel",
        "LoadModel",
        "ReloadModel",
        "UnloadModel",
        "DeleteModel",
        "DeleteModelFiles",
    ):
        double.on(method, DONE)
    for method in (
        "GetOperation",
        "UpdateOperation",
        "CancelOperation",
        "PauseOperation",
        "ResumeOperation",
    ):
        double.on(method, RUNNING)
    double.on("CreateModel", MODEL)
    double.on("PinModel", MODEL)
    double.on("AcquireLease", slots_pb2.Lease(name="leases/one", model="models/mini"))
    double.on("ReleaseLease", empty_pb2.Empty())
    double.on("ClearSlot", empty_pb2.Empty())
    double.on(
        "ListSlots",
        residency_service_pb2.ListSlotsResponse(
            slots=[slots_pb2.Slot(name="slots/role", model="models/mini", etag="1")]
        ),
    )
    double.on("SwitchSlot", DONE)
    double.on(
        "GetStorage",
        storage_pb2.Storage(
            home="/srv/mh", blob_bytes=1536, blob_count=2, free_bytes=2**30, total_bytes=2**31,
            models=[{"model": "models/mini", "size_bytes": 1536}],
        ),
    )  # fmt: skip
    double.on(
        "ListQuarantine",
        host_service_pb2.ListQuarantineResponse(
            quarantined_files=[{"name": "quarantine/1-a", "model": "models/mini", "message": "why"}]
        ),
    )
    double.on("RestoreQuarantined", MODEL)
    double.on("DeleteQuarantined", empty_pb2.Empty())
    double.on("VerifyModel", DONE)
    double.on("CheckStorage", DONE)
    double.on("PruneStorage", DONE)
    double.on("UnpinModel", MODEL)
    return double
