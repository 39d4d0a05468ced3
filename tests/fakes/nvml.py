# ruff: noqa: N802 -- the names are those of pynvml
"""A driver's management library (pynvml) with the GPUs that a test gives it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GIB = 2**30


@dataclass
class FakeGpu:
    """One GPU: ``processes`` is pid -> bytes (None: the driver does not say)."""

    uuid: str
    name: str = "Fake GPU"
    total_bytes: int = 24 * GIB
    reserved_bytes: int = GIB
    capability: tuple[int, int] = (9, 0)
    processes: dict[int, int | None] = field(default_factory=dict)
    parts: Sequence["FakeGpu | None"] | None = None
    """MIG: what each place holds; None as a whole = MIG is off."""
    broken: bool = False


class FakeLibrary:
    """The part of pynvml that is used."""

    class NVMLError(Exception):
        """What every call may raise."""

    NVML_DEVICE_MIG_ENABLE = 1
    nvmlMemory_v2 = 0x02000028  # noqa: N815 -- pynvml's name

    def __init__(self, *gpus: FakeGpu, driver: str | None = "570.1", old: bool = False) -> None:
        self.gpus = list(gpus)
        self.driver = driver
        self.old = old

    def nvmlInit(self) -> None:
        if self.driver is None:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str:
        assert self.driver is not None
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if self.gpus[index].broken:
            raise self.NVMLError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> FakeGpu:
        parts = [part for gpu in self.gpus for part in gpu.parts or () if part]
        for gpu in (*self.gpus, *parts):
            if gpu.uuid == uuid.decode():
                return gpu
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:
        return gpu.capability

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> bytes:
        return gpu.name.encode()

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> Any:
        if version is None:
            return SimpleNamespace(total=gpu.total_bytes)
        if self.old:
            raise self.NVMLError("Function Not Found")
        return SimpleNamespace(total=gpu.total_bytes, reserved=gpu.reserved_bytes)

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> tuple[int, int]:
        if self.old:
            raise self.NVMLError("Not Supported")
        return (0, 0) if gpu.parts is None else (1, 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu) -> int:
        return len(gpu.parts or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, index: int) -> FakeGpu:
        part = (gpu.parts or ())[index]
        if part is None:
            raise self.NVMLError("Not Found")
        return part

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        return [SimpleNamespace(pid=p, usedGpuMemory=used) for p, used in gpu.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        if self.old:
            raise self.NVMLError("Not Supported")
        return self.nvmlDeviceGetComputeRunningProcesses(gpu)[:1]
