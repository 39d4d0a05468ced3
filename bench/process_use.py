"""What a process uses, from /proc: memory, descriptors, CPU, children."""

import os
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    """Return the resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def peak_bytes(pid: int) -> int:
    """Return the largest resident memory since the start, or since ``forget_peak``."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def forget_peak(pid: int) -> None:
    """Let the peak begin again from the memory of now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def descriptors(pid: int) -> int:
    """Return how many descriptors are open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_s(pid: int) -> float:
    """Return the CPU time used so far, of user and system together."""
    # After the name, which may have any character.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def page_faults(pid: int) -> int:
    """Return how often a page was given to it or found for it, without reading a file."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def children(pid: int) -> list[int]:
    """Return the process ids of its children that run.

    By everybody's parent: the kernel's own list of children may leave some out (proc(5)).
    """
    everybody = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return sorted(one for one in everybody if _state_and_parent(one) == (True, pid))


def _state_and_parent(pid: int) -> tuple[bool, int]:
    """Return whether a process runs, and its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False, 0
    return fields[0] not in "ZX", int(fields[1])


def running(pid: int) -> bool:
    """Whether a process is there and has not ended: one that nobody has waited for does not count."""
    return _state_and_parent(pid)[0]
