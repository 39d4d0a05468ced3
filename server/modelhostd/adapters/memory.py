"""The machine's memory as this process may use it: /proc and the control group."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from modelhostd.core.values import dataclass

# Version 1 says "no limit" by a number near 2^63.
_UNLIMITED = 2**60


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: all that there are, and those that are free or can be freed at once."""

    total_bytes: int
    available_bytes: int


def read(root: Path = Path("/")) -> Memory:
    """Return the machine's RAM, or less where a control group allows less.

    Page cache counts as available. Sources: proc(5) MemAvailable, the kernel's cgroup-v2 and
    cgroup-v1 memory documents.
    """
    info = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (
            line.partition(":") for line in (root / "proc/meminfo").read_text().splitlines()
        )
        if rest.split()[:1] and rest.split()[0].isdigit()
    }
    total, available = info["MemTotal"], info.get("MemAvailable", info["MemFree"])
    for limit, used in _groups(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Memory(total, available)


def oom_kills(root: Path = Path("/")) -> int | None:
    """Return how many processes the kernel has killed for memory since the machine started; None = it does not tell.

    Of a control group, too, and in a container often those of all others. Source: /proc/vmstat, ``oom_kill``.
    """
    try:
        lines = (root / "proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("oom_kill ")]
    return int(found[0][1]) if found and found[0][1].isdigit() else None


def resident_bytes(pids: Iterable[int], root: Path = Path("/")) -> int:
    """Return the resident memory of processes; one that is gone counts as nothing."""
    total = 0
    for pid in pids:
        try:
            text = (root / f"proc/{pid}/status").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) * 1024
    return total


def processor_name(root: Path = Path("/")) -> str:
    """Return what the processor calls itself, or ``CPU``."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    return "CPU"


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, used without page cache) of every control group above this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mount = root / "sys/fs/cgroup"
        if number == "0":
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            if found := _group(group, *names):
                yield found
            group = group.parent


def _group(group: Path, limit: str, used: str, cached: str) -> tuple[int, int] | None:
    try:
        limit_text = (group / limit).read_text().strip()
        if not limit_text.isdigit() or int(limit_text) >= _UNLIMITED:
            return None
        used_bytes = int((group / used).read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == cached:
                used_bytes -= int(value)
    except (OSError, ValueError):
        return None
    return int(limit_text), max(0, used_bytes)
