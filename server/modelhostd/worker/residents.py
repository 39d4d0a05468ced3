"""The instances of a worker, and their ways between its device and host RAM."""

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Phase
from modelhostd.core.values import dataclass
from modelhostd.worker import failures
from modelhostd.worker.backend import Backend
from modelhostd.worker.channel import Channel
from modelhostd.worker.executor import Executor, exit_now
from modelhostd.worker.imaging import Imaging
from modelhostd.worker.jobs import Activity, Hosted
from modelhostd.worker.own_threads import start_thread
from modelhostd.worker.process import free_memory
from modelhostd.worker.runner import POISONED_EXIT
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.blackbox import ENTRIES, BlackBox
from modelhostd.worker.wire.frames import Frame, Key, Kind

if TYPE_CHECKING:
    from modelhostd.worker.image.image import Image

log = logging.getLogger("modelhostd.worker")


@dataclass(eq=False)
class _Resident:
    """One instance; ``lock`` is held while it changes its place."""

    key: Key
    hosted: Hosted
    loaded: worker_pb2.LoadedHeader
    image: "Image | None"
    warm: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Residents:
    """The instances that were loaded, on the device or warm, and the commands that move and end them."""

    def __init__(
        self, device: str, executor: Executor, imaging: Imaging, channel: Channel, box: BlackBox
    ) -> None:
        self._device = device
        self._imaging = imaging
        self._executor = executor
        self._channel = channel
        self._box = box
        self._residents: dict[Key, _Resident] = {}
        self._promotions: dict[int, _Promotion] = {}
        self._endings: dict[int, Activity] = {}

    @property
    def activities(self) -> list[Activity]:
        """What each promotion in progress does, and whatever frees memory."""
        promotions = [promotion.activity for promotion in list(self._promotions.values())]
        return [*promotions, *list(self._endings.values())]

    def add(self, hosted: Hosted, loaded: worker_pb2.LoadedHeader, image: "Image | None") -> None:
        """Have a loaded instance take requests."""
        self._residents[hosted.key] = _Resident(hosted.key, hosted, loaded, image)
        self._executor.add(hosted)

    def unload(self, frame: Frame) -> None:
        """Begin an UNLOAD; it is answered by UNLOADED when the memory is free."""
        self._start(self._unload, frame)

    def demote(self, frame: Frame) -> None:
        """Begin a DEMOTE; it is answered by DEMOTED when the device's memory is free."""
        self._start(self._demote, frame)

    def drop_copy(self, frame: Frame) -> None:
        """Begin a DROP_COPY; it is answered by COPY_DROPPED when the copy's memory is free."""
        self._start(self._drop_copy, frame)

    def promote(self, frame: Frame) -> None:
        """Begin a PROMOTE; it is answered by LOADED or ERROR."""
        activity = self._activity(frame, loading=True)
        promotion = self._promotions[frame.request] = _Promotion(frame, activity)
        self._start(lambda _: self._promote(promotion), frame)

    def cancel(self, request: int) -> None:
        """Have a promotion stop between two copies; it is answered CANCELLED, and its instance stays warm."""
        promotion = self._promotions.get(request)
        if promotion is not None:
            promotion.cancelled.set()

    # --- inside ---------------------------------------------------------------------------------

    def _start(self, run: Callable[[Frame], None], frame: Frame) -> None:
        name = f"{Kind(frame.kind).name.lower()}-{frame.request}"
        start_thread(run, frame, name=name)

    def _activity(self, frame: Frame, *, loading: bool) -> Activity:
        first = len(self._executor.activities)
        entry = first + frame.request % max(1, ENTRIES - first)
        name = f"{Kind(frame.kind).name.lower()}-{frame.request}"
        return Activity(name, self._box, entry, loading=loading)

    def _unload(self, frame: Frame) -> None:
        header = worker_pb2.UnloadHeader.FromString(frame.header)
        resident = self._residents.get((header.instance, frame.generation))
        if resident is None:
            self._imaging.drop((header.instance, frame.generation))
        else:
            with resident.lock:
                if self._holds(resident):
                    self._free(resident, frame)
        answer = worker_pb2.UnloadedHeader(found=resident is not None).SerializeToString()
        self._answer(Kind.UNLOADED, frame, answer)

    def _free(self, resident: _Resident, frame: Frame) -> None:
        """Let go of an instance and all of its memory; its lock is held.

        From when its requests have ended it is an activity: a backend that never ends is found as a hang.
        """
        del self._residents[resident.key]
        self._executor.remove(resident.key)
        activity = self._endings[frame.request] = self._activity(frame, loading=False)
        activity.begin(resident.hosted.model)
        backend = weakref.ref(resident.hosted.backend)
        may_leave_cycles = resident.hosted.backend.may_leave_cycles
        let_go(resident.hosted.backend)
        # Not only from the list: whoever waits for the lock has the resident in its hands.
        image = resident.image
        del resident.hosted, resident.image
        self._imaging.close(image)
        # A backend that is still there is in a cycle, or in somebody's hands.
        looking = may_leave_cycles or backend() is not None
        free_memory(thorough=image is None, looking=looking)
        activity.end()
        del self._endings[frame.request]

    def _holds(self, resident: _Resident) -> bool:
        """Whether it is still here; asked with its lock held."""
        return self._residents.get(resident.key) is resident

    def _demote(self, frame: Frame) -> None:
        header = worker_pb2.DemoteHeader.FromString(frame.header)
        resident = self._residents.get((header.instance, frame.generation))
        answer = worker_pb2.DemotedHeader(found=resident is not None)
        if resident is not None:
            with resident.lock:
                if self._holds(resident):
                    answer.host_bytes = self._leave_device(resident, frame)
                # The device's memory is free: what is left to do may take longer than that did.
                self._answer(Kind.DEMOTED, frame, answer.SerializeToString())
                if self._holds(resident) and resident.warm and resident.image is not None:
                    resident.image.unpoint()
            return
        self._answer(Kind.DEMOTED, frame, answer.SerializeToString())

    def _leave_device(self, resident: _Resident, frame: Frame) -> int:
        """Return the bytes of host RAM that are kept; 0 = the instance is freed whole."""
        image = resident.image
        if resident.warm:
            return resident.loaded.host_bytes
        self._executor.remove(resident.key)
        if image is not None and image.host_bytes:
            if image.evict():
                resident.warm = True
                return image.host_bytes
            log.warning(
                "model %s keeps views of its weights beside its parameters and buffers: it cannot "
                "be kept warm and is unloaded whole",
                resident.hosted.model,
            )
        self._free(resident, frame)
        return 0

    def _drop_copy(self, frame: Frame) -> None:
        header = worker_pb2.DropCopyHeader.FromString(frame.header)
        resident = self._residents.get((header.instance, frame.generation))
        answer = worker_pb2.CopyDroppedHeader(found=resident is not None)
        if resident is not None:
            # Who runs in the module meanwhile is not waited for: it is on the device.
            with resident.lock:
                if self._holds(resident):
                    answer.host_bytes = self._leave_host(resident, frame)
        self._answer(Kind.COPY_DROPPED, frame, answer.SerializeToString())

    def _leave_host(self, resident: _Resident, frame: Frame) -> int:
        """Return the bytes of host RAM that stay though the instance's copy was to go; its lock is held."""
        image = resident.image
        if resident.warm or image is None or not image.is_copy:
            return resident.loaded.host_bytes
        activity = self._endings[frame.request] = self._activity(frame, loading=False)
        activity.begin(resident.hosted.model)
        left = image.release_host()
        resident.loaded.host_bytes = 0
        activity.end()
        del self._endings[frame.request]
        return left

    def _promote(self, promotion: "_Promotion") -> None:
        frame = promotion.frame
        failure = self._try(promotion)
        promotion.activity.end()
        self._promotions.pop(frame.request, None)
        if failure is not None:
            self._channel.send_error(frame.request, frame.generation, failure)

    def _try(self, promotion: "_Promotion") -> ModelhostError | None:
        frame = promotion.frame
        instance = worker_pb2.PromoteHeader.FromString(frame.header).instance
        resident = self._residents.get((instance, frame.generation))
        if resident is None:
            return failures.not_loaded(instance)
        loaded = worker_pb2.LoadedHeader()
        with resident.lock:
            if not self._holds(resident):
                return failures.not_loaded(instance)
            loaded.CopyFrom(resident.loaded)
            begin = time.monotonic()
            failure = self._swap_in(resident, promotion) if resident.warm else None
            if failure is not None:
                return failure
            loaded.load_s = time.monotonic() - begin
        size = loaded.measured_bytes
        progress = worker_pb2.LoadProgressHeader(
            phase=Phase.LOADING, done_bytes=size, total_bytes=size
        )
        header = progress.SerializeToString()
        self._channel.send(Kind.LOAD_PROGRESS, 0, frame.request, frame.generation, header)
        promotion.activity.end()
        self._answer(Kind.LOADED, frame, loaded.SerializeToString())
        return None

    def _swap_in(self, resident: _Resident, promotion: "_Promotion") -> ModelhostError | None:
        hosted, image = resident.hosted, resident.image
        assert image is not None, "only what has an image is kept warm"
        promotion.activity.begin(hosted.model)
        try:
            image.swap_in(promotion.cancelled.is_set)
        except BaseException as error:
            if hosted.backend.is_poisoned(error):
                log.error("the device is in an undefined state; this worker ends", exc_info=error)
                exit_now(POISONED_EXIT)
            about = hosted.backend_name, "", self._device, Path()
            return failures.from_load(error, hosted.model, *about)
        resident.warm = False
        self._executor.add(hosted)
        return None

    def _answer(self, kind: Kind, frame: Frame, header: bytes) -> None:
        self._channel.send(kind, frames.FINAL, frame.request, frame.generation, header)


@dataclass(eq=False)
class _Promotion:
    """One PROMOTE in progress."""

    frame: Frame
    activity: Activity
    cancelled: threading.Event = field(default_factory=threading.Event)


def let_go(backend: Backend) -> None:
    """Have a backend drop its memory; a backend that cannot even do that is logged and dropped."""
    try:
        backend.unload()
    except Exception:
        log.exception("a backend failed to unload")
