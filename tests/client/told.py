"""What the daemon's double tells in the tests of the command line."""

from modelhost.v1 import devices_pb2, instances_pb2, models_pb2, operations_pb2

ID = "11111111-2222-4333-8444-555555555555"
NAME = f"operations/{ID}"
MODEL = models_pb2.Model(
    name="models/mini",
    task="feature-extraction",
    state="AVAILABLE",
    pinned=True,
    labels={"team": "a"},
    source={"uri": "hf://o/mini", "revision": "main"},
    config={"isolation": "PROCESS", "keep_alive": {"seconds": 300}},
    artifacts=[{"version": 2, "state": "AVAILABLE", "size_bytes": 1536, "file_count": 3, "revision": "abc"}],
)  # fmt: skip
INSTANCE = instances_pb2.Instance(
    name="models/mini/instances/1",
    model="models/mini",
    device="devices/cpu",
    state="READY",
    tier="DEVICE",
    measured_bytes=2048,
    health={"status": "HEALTHY"},
    activity={"in_flight": 1, "request_count": 9},
)
DEVICE = devices_pb2.Device(
    name="devices/cpu", kind="CPU", display_name="Some CPU", budget_bytes=2**30
)
RUNNING = operations_pb2.Operation(name=NAME, kind="DOWNLOAD", model="models/mini", state="RUNNING")
DONE = operations_pb2.Operation(
    name=NAME,
    kind="DOWNLOAD",
    model="models/mini",
    state="SUCCEEDED",
    download_result={"file_count": 2, "size_bytes": 1024, "version": 1, "revision": "abc"},
)
