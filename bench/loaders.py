"""Other loaders of safetensors, and the heap that they load to: what ours is measured beside on a CPU."""

import ctypes
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def empty_heap() -> None:
    """Have malloc hold nothing that is free, and ask the system for each large piece.

    By itself it moves between this and a heap that is kept: what is freed raises the size from which the system is
    asked, and the end of the heap goes back as soon as nothing small lies behind it.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    libc.malloc_trim(0)


def fill_heap(way: Callable[[], object]) -> None:
    """Have malloc hold what a way needs, from having done it once."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # The most that glibc takes.
    libc.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
    way()


def fastsafetensors(path: Path) -> Callable[[], object] | None:
    """Return a load by that library, if it is installed, to tensors on the CPU that are all used."""
    try:
        fast = importlib.import_module("fastsafetensors")
    except ImportError:
        print("# fastsafetensors is not installed: left out", file=sys.stderr)
        return None
    import torch

    def load() -> None:
        loader = fast.SafeTensorsFileLoader(fast.SingleGroup(), torch.device("cpu"), nogds=True)
        loader.add_filenames({0: [str(path)]})
        buffer = loader.copy_files_to_device()
        _ = [buffer.get_tensor(name) for name in loader.get_keys()]
        buffer.close()
        loader.close()

    return load
