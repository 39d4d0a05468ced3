"""GPUs as the NVIDIA driver's management library (NVML) tells of them, without CUDA in this process.

API: https://docs.nvidia.com/deploy/nvml-api/. ``pynvml`` is imported when first asked; without it, or
without a driver, there are no GPUs. Calls may block in the driver, so they are made from a thread.
"""

import ctypes
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from modelhostd.core.values import dataclass

log = logging.getLogger(__name__)

_SHOWN = "CUDA_VISIBLE_DEVICES"
_LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one part of a GPU that is split by MIG."""

    uuid: str
    name: str
    total_bytes: int
    """Less what the driver keeps for itself."""
    compute_capability: str
    driver_version: str


def visible(gpus: list[Gpu], environment: Mapping[str, str]) -> dict[int, Gpu]:
    """Return index -> GPU for those that ``CUDA_VISIBLE_DEVICES`` leaves; unset: all.

    Entries are indices in NVML's order or beginnings of UUIDs; as in CUDA the first bad one ends the
    list. The index of a GPU does not depend on which others are visible.
    """
    shown = environment.get(_SHOWN)
    if shown is None:
        return dict(enumerate(gpus))
    found: dict[int, Gpu] = {}
    for entry in (part.strip() for part in shown.split(",")):
        matching = [
            index
            for index, gpu in enumerate(gpus)
            if str(index) == entry
            or (entry.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(entry))
        ]
        if len(matching) != 1:
            break
        found[matching[0]] = gpus[matching[0]]
    return dict(sorted(found.items()))


class Nvml:
    """The library, begun when first used. Not for two threads at one time."""

    def __init__(self, load: Callable[[], Any] | None = None) -> None:
        self._load = load or _import
        self._library: Any = None
        self._told = False

    def gpus(self) -> list[Gpu]:
        """Return the GPUs in the driver's order (PCI); none without a driver."""
        library = self._begun()
        if library is None:
            return []
        try:
            driver = _text(library.nvmlSystemGetDriverVersion())
            return [
                gpu
                for index in range(library.nvmlDeviceGetCount())
                for gpu in self._parts(library, index, driver)
            ]
        except library.NVMLError as error:
            log.warning("the GPUs cannot be listed: %s", error)
            return []

    def foreign_bytes(self, uuid: str, own_pids: Collection[int]) -> int:
        """Return memory that processes other than ``own_pids`` use on a GPU; 0 where unknown.

        A process whose figure the driver does not give (MIG, WSL) counts as nothing. Process ids are
        those of the driver: inside a container with a pid namespace of its own they match nobody's.
        """
        library = self._begun()
        if library is None:
            return 0
        used: dict[int, int] = {}
        try:
            handle = library.nvmlDeviceGetHandleByUUID(uuid.encode())
        except library.NVMLError as error:
            log.warning("GPU %s cannot be read: %s", uuid, error)
            return 0
        for kind in ("Compute", "Graphics"):
            try:
                processes = getattr(library, f"nvmlDeviceGet{kind}RunningProcesses")(handle)
            except library.NVMLError:
                continue  # not supported on this GPU
            for process in processes:
                # A process with both kinds of context is listed twice with the same figure.
                figure = process.usedGpuMemory or 0
                used[process.pid] = max(used.get(process.pid, 0), figure)
        return sum(figure for pid, figure in used.items() if pid not in own_pids)

    def _begun(self) -> Any:
        if self._library is not None:
            return self._library
        try:
            library = self._load()
        except ImportError as error:
            self._tell(f"no GPU is used: {error}")
            return None
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            self._tell(f"no GPU is used: {error}")
            return None
        self._library = library
        return library

    def _tell(self, text: str) -> None:
        if not self._told:
            log.info(text)
        self._told = True

    def _parts(self, library: Any, index: int, driver: str) -> Iterator[Gpu]:
        """Yield a GPU, or its parts where MIG is on: then the whole serves nobody."""
        try:
            whole = library.nvmlDeviceGetHandleByIndex(index)
            major, minor = library.nvmlDeviceGetCudaComputeCapability(whole)
            handles = self._mig(library, whole) if _mig_is_on(library, whole) else [whole]
            for handle in handles:
                yield Gpu(
                    uuid=_text(library.nvmlDeviceGetUUID(handle)),
                    name=_text(library.nvmlDeviceGetName(handle)),
                    total_bytes=_usable_bytes(library, handle),
                    compute_capability=f"{major}.{minor}",
                    driver_version=driver,
                )
        except library.NVMLError as error:
            log.warning("GPU %d cannot be used: %s", index, error)

    def _mig(self, library: Any, whole: Any) -> Iterator[Any]:
        for index in range(library.nvmlDeviceGetMaxMigDeviceCount(whole)):
            try:
                yield library.nvmlDeviceGetMigDeviceHandleByIndex(whole, index)
            except library.NVMLError:
                continue  # places for parts that were not made


def _usable_bytes(library: Any, handle: Any) -> int:
    try:
        memory = library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2)
    except library.NVMLError:  # a driver older than 510 knows nothing of what it reserves
        return int(library.nvmlDeviceGetMemoryInfo(handle).total)
    return int(memory.total - memory.reserved)


def _mig_is_on(library: Any, handle: Any) -> bool:
    try:
        current, _ = library.nvmlDeviceGetMigMode(handle)
    except library.NVMLError:
        return False
    return bool(current == library.NVML_DEVICE_MIG_ENABLE)


def _import() -> Any:
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        # Said here: without a driver, importing pynvml would be a fortieth of the daemon's start for nothing.
        raise ImportError(str(error)) from None
    import pynvml  # type: ignore[import-untyped]

    return pynvml


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
