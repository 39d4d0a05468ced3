"""What the supervisor decides and passes on: hangs, blame, environment, command line, delays."""

import asyncio
import contextvars

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.adapters.workers import seat as seats
from modelhostd.adapters.workers.config import WorkersConfig, environment
from modelhostd.adapters.workers.liveness import Liveness
from modelhostd.adapters.workers.process import command
from modelhostd.core.backoff import Backoff
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker.__main__ import ordered
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire.blackbox import ENTRIES, PAGE_BYTES, BlackBox, Work, blame


def thread(progress, model="m", name="executor-0", *, loading=False):
    """Return what one thread says in a heartbeat."""
    return worker_pb2.ThreadState(name=name, progress=progress, model=model, loading=loading)


def test_silence_is_a_hang_of_the_whole_process():
    """Without a heartbeat for the timeout nothing runs, whatever was said before."""
    liveness = Liveness(10, now=0)
    liveness.beat([thread(1, model="")], now=5)
    assert liveness.hang(now=15) is None
    assert liveness.hang(now=15.1).model == ""


def test_a_thread_that_does_not_get_on_is_a_hang_of_its_model():
    """Heartbeats do not help where a thread's progress stands still; any progress starts anew."""
    liveness = Liveness(10, now=0)
    for now in range(1, 12):
        liveness.beat([thread(7), thread(now, "n", "executor-1")], now=now)
    assert liveness.hang(now=11) is None
    liveness.beat([thread(7), thread(12, "n", "executor-1")], now=12)
    assert liveness.hang(now=12).model == "m"
    liveness.beat([thread(8)], now=13)
    assert liveness.hang(now=14) is None


def test_idle_and_loading_threads_may_stand_still():
    """An idle thread makes no progress, and a load has a timeout of its own."""
    liveness = Liveness(10, now=0)
    for now in range(100):
        liveness.beat([thread(7, model=""), thread(7, name="load-1", loading=True)], now=now)
        assert liveness.hang(now=now) is None


def test_the_black_box_tells_what_was_begun_and_not_ended():
    """Entries are written, cleared and read apart from each other; those past the page are left out."""
    box = BlackBox(memoryview(bytearray(PAGE_BYTES)))
    works = [Work(7, 100, "one", loading=False), Work(2**64 - 1, 2**63, "m" * 64, loading=True)]
    for entry, work in ((0, works[0]), (ENTRIES - 1, works[1]), (ENTRIES, works[0])):
        box.write(entry, work.thread, work.begin_ns, work.model, loading=work.loading)
    assert box.read() == works
    box.clear(0)
    box.clear(ENTRIES)
    assert box.read() == works[1:]


@given(st.binary(min_size=1, max_size=300))
def test_any_page_can_be_read(pattern):
    """A worker that wrote nonsense over its page cannot break the daemon that reads it."""
    page = (pattern * PAGE_BYTES)[:PAGE_BYTES]
    assert len(BlackBox(memoryview(page)).read()) <= ENTRIES


def test_blame_falls_on_the_thread_that_crashed():
    """The thread that faulthandler names decides; else a load, else what began last; else nobody."""
    works = [
        Work(0x7F01, 300, "latest", loading=False),
        Work(0x7F02, 100, "first", loading=False),
    ]
    dump = (
        "Fatal Python error: Segmentation fault\n\nCurrent thread 0x0000000000007f02 (most recent"
    )
    assert blame(works, dump) == "first"
    assert blame(works, "") == "latest"
    assert blame([*works, Work(1, 50, "load", loading=True)], "") == "load"
    assert blame([], dump) == ""


def test_a_worker_sees_no_secret_of_the_daemon():
    """Only named variables pass; tokens, proxies and endpoints do not, and the operator has the last word."""
    own = {
        "PATH": "/bin", "LC_ALL": "C", "HF_TOKEN": "hf_x", "HTTPS_PROXY": "http://u:p@h",
        "AWS_SECRET_ACCESS_KEY": "x", "HF_ENDPOINT": "http://h", "MODELHOST_X": "y",
        "CUDA_VISIBLE_DEVICES": "1",
    }  # fmt: skip
    given_by_operator = {"OMP_NUM_THREADS": "3", "PATH": "/opt/bin"}
    seen = environment(WorkersConfig(environment=given_by_operator), own)
    assert seen["PATH"] == "/opt/bin"
    assert (seen["LC_ALL"], seen["CUDA_VISIBLE_DEVICES"]) == ("C", "1")
    assert (seen["HF_HUB_OFFLINE"], seen["TOKENIZERS_PARALLELISM"]) == ("1", "false")
    assert not {"HF_TOKEN", "HTTPS_PROXY", "AWS_SECRET_ACCESS_KEY", "HF_ENDPOINT"} & seen.keys()


def test_the_operators_threads_bound_the_libraries_of_a_worker():
    """``worker.threads`` of the configuration goes over the daemon's own environment; 0 leaves that, or the library's choice."""
    own = {"OMP_NUM_THREADS": "8"}
    assert environment(WorkersConfig(compute_threads=2), own)["OMP_NUM_THREADS"] == "2"
    assert environment(WorkersConfig(), own)["OMP_NUM_THREADS"] == "8"
    assert "OMP_NUM_THREADS" not in environment(WorkersConfig(), {})


def test_a_worker_is_started_isolated():
    """The interpreter ignores environment and working directory; both import roots are named."""
    line = command(WorkersConfig(python="python9", import_paths=("/extra",)), {"control": 4})
    assert line[:2] == ["python9", "-I"]
    assert line[2].endswith("modelhostd/worker/__main__.py")
    assert "--control=4" in line
    assert line[-1] == "--path=/extra"
    assert any(word.startswith("--code=") for word in line)


def test_a_worker_runs_the_daemons_code_whatever_else_is_installed():
    """The daemon's folders go before installed packages, where another version may be, and after Python's own modules."""
    found = ["/python/lib", "/python/site-packages", "/other-version"]
    assert ordered(found, ["/tree/server", "/tree/client"], ["/extra"]) == [
        "/python/lib", "/tree/server", "/tree/client", "/python/site-packages", "/other-version", "/extra",
    ]  # fmt: skip
    assert ordered(found, ["/python/site-packages"], []) == found


def test_backends_are_names_with_optional_targets():
    """An allowed backend is an entry point's name, or a name with its target."""
    config = WorkersConfig(backends=("identity", "mine = a.b:C"))
    assert config.allowed_backends() == [("identity", ""), ("mine", "a.b:C")]


async def test_a_load_is_refused_while_the_next_start_is_far_off():
    """After many crashes a load is told at once when to come back, instead of being kept waiting."""
    loop = asyncio.get_running_loop()
    seat = seats.Seat(WorkersConfig(), "cpu", "", *[lambda *_: None] * 3)
    seat._backoff = Backoff(9)
    seat._due = loop.time() + 40
    with pytest.raises(ModelhostError) as caught:
        await seat.ready()
    assert caught.value.reason is Reason.WORKER_LOST
    assert 5 < caught.value.retry_delay_s <= 40


async def test_a_worker_does_not_belong_to_the_call_that_started_it(monkeypatch):
    """What it does and logs for hours is not under the request id of the load that was first."""
    call = contextvars.ContextVar("call", default="none")
    call.set("a load")
    seen = []

    class Started:
        def __init__(self, *_):
            self.exited = asyncio.get_running_loop().create_future()

        async def launch(self):
            seen.append(call.get())

        async def greet(self):
            pass

    monkeypatch.setattr(seats, "Worker", Started)
    ready = asyncio.Event()

    def on_ready(_):
        seen.append(call.get())
        ready.set()

    seat = seats.Seat(WorkersConfig(), "cpu", "", on_ready, *[lambda *_: None] * 2)
    await seat.ready()
    await ready.wait()
    assert seen == ["none", "none"]
