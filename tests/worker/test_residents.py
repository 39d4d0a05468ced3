"""Instances that two commands want to move at a time."""

import gc
import weakref

import pytest
import torch

from modelhostd.worker.backend import LoadContext
from modelhostd.worker.executor import Executor
from modelhostd.worker.imaging import Draft, Imaging
from modelhostd.worker.jobs import Hosted
from modelhostd.worker.residents import Residents
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire.blackbox import PAGE_BYTES, BlackBox
from modelhostd.worker.wire.frames import Frame, Kind
from tests.worker.torch_backend import TorchBackend


class Channel:
    """Remembers the kinds of what is sent."""

    def __init__(self) -> None:
        self.sent: list[Kind] = []

    def send(self, kind: Kind, *_: object) -> None:
        """Remember it."""
        self.sent.append(kind)


class Lock:
    """Who waited for it finds what another has done meanwhile."""

    def __init__(self, meanwhile) -> None:
        self._meanwhile = meanwhile

    def __enter__(self) -> None:
        self._meanwhile()

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def channel():
    """Give what the daemon would hear."""
    return Channel()


@pytest.fixture
def residents(channel):
    """Give a worker's instances: ``a``, which is on the device."""
    box, imaging = BlackBox(memoryview(bytearray(PAGE_BYTES))), Imaging("sim-0")
    draft, backend = Draft(imaging), TorchBackend()
    backend.load(LoadContext("a", "nowhere", "awkward", "sim-0", memory=draft.memory))
    image = draft.finish(backend, keep=True)
    residents = Residents("sim-0", Executor(1, 1, box, print), imaging, channel, box)
    hosted = Hosted("a", 1, "a", 1, "sim-0", "torch", backend, backend.signature(), 1)
    residents.add(hosted, worker_pb2.LoadedHeader(), image)
    return residents


def demote(residents) -> None:
    """Take ``a`` off the device."""
    header = worker_pb2.DemoteHeader(instance="a").SerializeToString()
    residents._demote(Frame(Kind.DEMOTE, 0, 1, 1, header, b""))


def test_a_demotion_that_waited_for_an_unload_is_answered(residents, channel):
    """What was warm is gone by then: nothing is kept, and the worker lives on."""
    demote(residents)
    (resident,) = residents._residents.values()
    assert resident.warm
    header = worker_pb2.UnloadHeader(instance="a").SerializeToString()
    unload = Frame(Kind.UNLOAD, 0, 2, 1, header, b"")
    resident.lock = Lock(lambda: residents._free(resident, unload))
    demote(residents)
    assert channel.sent == [Kind.DEMOTED] * 2


@pytest.mark.parametrize("cycle", [False, True])
def test_an_unload_looks_for_cycles_only_where_there_are_some(residents, cycle, monkeypatch):
    """A look at all objects holds every request of the worker: not for a backend that leaves none and is gone without it."""
    monkeypatch.setattr(TorchBackend, "may_leave_cycles", False)
    looks = []
    real = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *generation: looks.append(1) or real(*generation))
    (resident,) = residents._residents.values()
    backend = resident.hosted.backend
    if cycle:
        backend.itself = backend
    gone = weakref.ref(backend)
    del resident, backend
    header = worker_pb2.UnloadHeader(instance="a").SerializeToString()
    residents._unload(Frame(Kind.UNLOAD, 0, 1, 1, header, b""))
    assert gone() is None
    assert len(looks) == cycle


def test_what_a_backend_left_in_cycles_is_free_when_its_unload_is_answered(residents):
    """The backend itself may be gone by then: of what it had beside its module nobody knows, unless it says that there is none."""
    (resident,) = residents._residents.values()
    workspace = resident.hosted.backend.workspace = torch.nn.Identity()
    workspace.itself = [workspace]
    gone = weakref.ref(workspace)
    del resident, workspace
    header = worker_pb2.UnloadHeader(instance="a").SerializeToString()
    residents._unload(Frame(Kind.UNLOAD, 0, 1, 1, header, b""))
    assert gone() is None
