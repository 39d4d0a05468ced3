"""The machine's devices: memory limits, GPUs, and a driver that is missing, old or hung."""

import os
import threading
from pathlib import Path

import pytest

from modelhostd.adapters import memory
from modelhostd.adapters.devices import MachineDevices
from modelhostd.adapters.nvml import Nvml
from tests.fakes.nvml import GIB, FakeGpu, FakeLibrary
from tests.support import wait_until_async

MEMINFO = (
    "MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: 12582912 kB\nHugePages_Total: 0\n"
)


def write(root: Path, path: str, text: str) -> None:
    """Write one file of a made-up machine."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a machine with 16 GiB, of which 12 are available."""
    write(tmp_path, "proc/meminfo", MEMINFO)
    write(tmp_path, "proc/cpuinfo", "processor : 0\nmodel name\t: Fast CPU 9000\n")
    write(tmp_path, f"proc/{os.getpid()}/status", "VmRSS:\t  1048576 kB\n")
    return tmp_path


async def devices_of(library: FakeLibrary, **environment: str) -> list[str]:
    """Return ``id uuid GiB`` of the GPUs that are found."""
    found = await MachineDevices(nvml=Nvml(lambda: library), environment=environment).discover()
    return [f"{f.id} {f.uuid} {f.total_bytes // GIB}" for f in found if f.kind == "CUDA"]


# memory


def test_memory_of_a_machine_without_limits(root: Path) -> None:
    """Without a control group the machine's own figures count."""
    assert memory.read(root) == memory.Memory(16 * GIB, 12 * GIB)
    write(root, "proc/self/cgroup", "0::/system.slice/x.service\n")
    write(root, "sys/fs/cgroup/system.slice/x.service/memory.max", "max\n")
    assert memory.read(root) == memory.Memory(16 * GIB, 12 * GIB)


@pytest.mark.parametrize("where", ["system.slice/x.service", "system.slice"])
def test_the_limit_of_a_control_group_counts(root: Path, where: str) -> None:
    """The least limit of the group and of those above it; its page cache is available."""
    write(root, "proc/self/cgroup", "0::/system.slice/x.service\n")
    group = f"sys/fs/cgroup/{where}"
    write(root, f"{group}/memory.max", f"{4 * GIB}\n")
    write(root, f"{group}/memory.current", f"{3 * GIB}\n")
    write(root, f"{group}/memory.stat", f"anon 5\ninactive_file {2 * GIB}\n")
    assert memory.read(root) == memory.Memory(4 * GIB, 3 * GIB)


def test_a_control_group_of_version_1_counts(root: Path) -> None:
    """The older interface has other names, and a huge number where there is no limit."""
    write(root, "proc/self/cgroup", "5:cpu:/\n4:memory:/docker/ab\n0::/\n")
    group = "sys/fs/cgroup/memory/docker/ab"
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root, f"{group}/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(root, f"{group}/memory.usage_in_bytes", f"{GIB}\n")
    write(root, f"{group}/memory.stat", "total_inactive_file 0\n")
    assert memory.read(root) == memory.Memory(2 * GIB, GIB)


@pytest.mark.parametrize("line", ["0::/../../etc", "garbage", "4:memory", "0::/gone"])
def test_an_odd_control_group_is_no_limit(root: Path, line: str) -> None:
    """What cannot be read limits nothing."""
    write(root, "proc/self/cgroup", line + "\n")
    assert memory.read(root).total_bytes == 16 * GIB


async def test_the_cpu_has_the_machine_s_memory_and_name(root: Path) -> None:
    """Foreign use of the CPU is what is not available and not ours."""
    write(root, "proc/77/status", "VmRSS:\t 2097152 kB\n")
    devices = MachineDevices(root=root, nvml=Nvml(FakeLibrary))
    (cpu,) = await devices.discover()
    assert (cpu.display_name, cpu.total_bytes) == ("Fast CPU 9000", 16 * GIB)
    assert await devices.foreign_bytes("cpu", []) == 3 * GIB
    assert await devices.foreign_bytes("cpu", [77, 78]) == GIB


def test_this_machine_can_be_read() -> None:
    """The real files have what is read here."""
    now = memory.read()
    assert 0 < now.available_bytes <= now.total_bytes
    assert memory.resident_bytes([os.getpid()]) > 1_000_000
    assert memory.processor_name()


def test_kills_for_memory_are_counted_where_the_kernel_tells(tmp_path: Path) -> None:
    """The kernel's own count; None where there is no such file or line, as in a kernel before 4.13."""
    assert memory.oom_kills(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("pgfault 7\noom_kill 3\noom_kill_x 9\n")
    assert memory.oom_kills(tmp_path) == 3
    (tmp_path / "proc/vmstat").write_text("pgfault 7\n")
    assert memory.oom_kills(tmp_path) is None


# GPUs


async def test_gpus_are_what_the_driver_says() -> None:
    """Name, UUID, capability, driver and memory less what the driver keeps."""
    library = FakeLibrary(FakeGpu("GPU-a", "H200", 141 * GIB, capability=(9, 0)))
    devices = MachineDevices(nvml=Nvml(lambda: library), environment={})
    _, gpu = await devices.discover()
    assert (gpu.id, gpu.kind, gpu.uuid, gpu.display_name) == ("cuda-0", "CUDA", "GPU-a", "H200")
    assert (gpu.total_bytes, gpu.compute_capability) == (140 * GIB, "9.0")
    assert gpu.driver_version == "570.1"


async def test_an_old_driver_gives_what_it_has() -> None:
    """Without the newer calls there are the total memory and no MIG."""
    library = FakeLibrary(FakeGpu("GPU-a", processes={5: GIB}), old=True)
    assert await devices_of(library) == ["cuda-0 GPU-a 24"]
    assert Nvml(lambda: library).foreign_bytes("GPU-a", []) == GIB


async def test_a_gpu_that_is_lost_is_left_out() -> None:
    """The others keep serving."""
    library = FakeLibrary(FakeGpu("GPU-a", broken=True), FakeGpu("GPU-b"))
    assert await devices_of(library) == ["cuda-0 GPU-b 23"]


async def test_parts_of_a_gpu_are_devices() -> None:
    """With MIG on, its parts are devices and the whole is not; empty places are skipped."""
    parts = [FakeGpu("MIG-1", total_bytes=10 * GIB, reserved_bytes=0), None,
             FakeGpu("MIG-2", total_bytes=20 * GIB, reserved_bytes=0)]  # fmt: skip
    library = FakeLibrary(FakeGpu("GPU-a", parts=parts), FakeGpu("GPU-b"))
    assert await devices_of(library) == ["cuda-0 MIG-1 10", "cuda-1 MIG-2 20", "cuda-2 GPU-b 23"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("", []),
        ("1", ["cuda-1 GPU-b1 23"]),
        ("1,0", ["cuda-0 GPU-a1 23", "cuda-1 GPU-b1 23"]),
        ("GPU-b", ["cuda-1 GPU-b1 23"]),
        ("0,9,1", ["cuda-0 GPU-a1 23"]),
        ("GPU-", []),
        ("-1", []),
    ],
)
async def test_cuda_visible_devices_is_honoured(shown: str, expected: list[str]) -> None:
    """Only visible GPUs are devices, and their ids do not depend on the others."""
    library = FakeLibrary(FakeGpu("GPU-a1"), FakeGpu("GPU-b1"))
    assert await devices_of(library, CUDA_VISIBLE_DEVICES=shown) == expected


async def test_foreign_memory_is_that_of_other_processes() -> None:
    """Ours and unknown figures count as nothing; a process listed twice counts once."""
    library = FakeLibrary(
        FakeGpu("GPU-a", processes={10: 3 * GIB, 11: GIB, os.getpid(): GIB, 12: None})
    )
    devices = MachineDevices(nvml=Nvml(lambda: library), environment={})
    await devices.discover()
    assert await devices.foreign_bytes("cuda-0", [11]) == 3 * GIB
    library.gpus.clear()
    assert await devices.foreign_bytes("cuda-0", [11]) == 0


@pytest.mark.parametrize("why", ["no package", "no driver"])
async def test_without_a_driver_there_is_the_cpu(why: str) -> None:
    """A machine without NVIDIA's library or driver is no failure."""

    def missing() -> FakeLibrary:
        if why == "no package":
            raise ImportError("No module named 'pynvml'")
        return FakeLibrary(driver=None)

    found = await MachineDevices(nvml=Nvml(missing), environment={}).discover()
    assert [facts.id for facts in found] == ["cpu"]


async def test_a_driver_that_hangs_does_not_hang_the_daemon() -> None:
    """Past the deadline there are no GPUs; later questions wait no longer than that either."""
    answer = threading.Event()
    library = FakeLibrary(FakeGpu("GPU-a"))

    class Hung(Nvml):
        def gpus(self) -> list:  # type: ignore[type-arg]
            answer.wait()
            return super().gpus()

    devices = MachineDevices(
        nvml=Hung(lambda: library), environment={}, driver_timeout_s=0.02, sim_bytes=GIB
    )
    assert [facts.id for facts in await devices.discover()] == ["cpu", "sim-0"]
    assert [facts.id for facts in await devices.discover()] == ["cpu", "sim-0"]
    answer.set()

    async def answered() -> bool:
        return len(await devices.discover()) == 3

    assert await wait_until_async(answered)  # type: ignore[arg-type]
