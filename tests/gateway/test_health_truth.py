"""Health tells the truth: ModelReady, grpc.health, /healthz and the events agree while workers die.

Mostly real worker processes, killed from outside or by what a request makes them do.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelhostd.adapters.clock import SystemClock
from modelhostd.adapters.workers import ProcessWorkers
from modelhostd.api.server import ApiConfig, ApiServer, build
from modelhostd.ports import Workers
from tests.api.support import CLIENT_OPTIONS, Limits, Tcp
from tests.gateway.support import Scene, gateway_on, value
from tests.gateway.truth import DEADLINE_S, Poll, State, Truth, watching
from tests.host.support import Running, World
from tests.worker.harness import CONFIG

HASTY = replace(CONFIG, hang_timeout_s=4.0, escalation_s=1.0)
"""Finds a hang soon. For those that want one: on a loaded machine it may find one where there is none."""


@dataclass
class Live:
    """A host with real workers, served by gRPC and HTTP, and its watcher."""

    running: Running
    workers: Workers
    server: ApiServer
    http: Scene
    truth: Truth

    @property
    def pid(self) -> int:
        """The only worker's process id."""
        (pid,) = self.workers.pids()
        return pid

    async def infer(self, do: str = "") -> grpc.StatusCode:
        """Send one request that makes the worker do something; return how it ended."""
        request = oip.ModelInferRequest(model_name=self.truth.model)
        request.parameters["do"].string_param = do
        stub = GRPCInferenceServiceStub(self.truth.channel)
        call = stub.ModelInfer(request, timeout=DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S):
            return await call.code()


@asynccontextmanager
async def live(
    tmp_path: Path, *, on_demand: bool, real: bool = True, hasty: bool = False, **options: object
) -> AsyncIterator[Live]:
    """Load a model of the trouble backend into a worker and watch it; judge at the end."""
    workers = ProcessWorkers(HASTY if hasty else CONFIG) if real else None
    clock = SystemClock() if real else None
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            World(tmp_path).host(
                real_workers=workers, real_clock=clock, health_interval_s=0.2 if options else 60.0
            )
        )
        host = running.host
        config = ApiConfig(
            addresses=[Tcp()], admin_socket=None, limits=Limits(), home=tmp_path, version="1"
        )
        server = build(host, config)
        await server.start()
        stack.push_async_callback(server.stop, 1.0)
        http = await stack.enter_async_context(gateway_on(host))
        channel = grpc.aio.insecure_channel(server.addresses[0], options=CLIENT_OPTIONS)
        await stack.enter_async_context(channel)

        async def barrier() -> int:
            await host.registry.flush()
            return host.registry.journal.last_sequence

        async def healthz() -> int:
            http.serving = server.health.serving
            return (await http.get("/healthz")).status

        truth = Truth(channel, healthz, barrier, on_demand=on_demand)
        await running.have(
            "m", backend="trouble", load_on_demand=on_demand, backend_options=options
        )
        await running.load("m")
        await stack.enter_async_context(watching(truth))
        yield Live(running, workers or running.workers, server, http, truth)


Harm = Callable[[Live, Path], Awaitable[object]]


async def kill(live: Live, tmp_path: Path) -> None:
    """End the worker from outside."""
    os.kill(live.pid, signal.SIGKILL)


async def stop(live: Live, tmp_path: Path) -> None:
    """Let the worker stand still, so that its heartbeat ends."""
    os.kill(live.pid, signal.SIGSTOP)


async def stuck(live: Live, tmp_path: Path) -> None:
    """Let a request never come back."""
    assert await live.infer(f"stuck:{tmp_path / 'stuck'}") is grpc.StatusCode.UNAVAILABLE


async def segv(live: Live, tmp_path: Path) -> None:
    """Let a request bring the worker down."""
    assert await live.infer("segv") is grpc.StatusCode.UNAVAILABLE


async def poison(live: Live, tmp_path: Path) -> None:
    """Let a request leave the worker in a state in which it cannot go on."""
    assert await live.infer("poison") is not grpc.StatusCode.OK


@pytest.mark.parametrize("harm", [kill, stop, stuck, segv, poison])
async def test_a_model_whose_worker_is_lost_is_not_ready_until_it_is_back(
    tmp_path: Path, harm: Harm
) -> None:
    """From the loss to READY every answer is no, before and after it yes, and the daemon serves."""
    async with live(tmp_path, on_demand=False, hasty=harm in (stop, stuck)) as scene:
        truth = scene.truth
        await truth.poll()
        harming = asyncio.ensure_future(harm(scene, tmp_path))
        await truth.poll_until(lambda: "READY" in truth.reasons)
        await harming
        await truth.caught_up()
        assert truth.reasons[-1] == "READY"
        assert truth.count("CRASHED") == 1
        said = [p.said for p in truth.polls if p.who == "ModelReady"]
        assert (said[0], said[-1]) == (True, True)
        assert not all(said), "no poll met the time without a worker"
        assert await scene.infer() is grpc.StatusCode.OK
        text = (await scene.http.get("/metrics")).body
        assert value(text, "modelhost_worker_crashes_total", device="sim-0") == 1
        assert value(text, "modelhost_worker_starts_total", device="sim-0") == 2
        assert value(text, "modelhost_model_loads_total", model="m", result="ready") == 2


async def test_where_requests_wait_a_lost_worker_is_no_reason_to_say_no(tmp_path: Path) -> None:
    """With load_on_demand a model is ready all the time, and a request sent meanwhile is answered."""
    async with live(tmp_path, on_demand=True) as scene:
        truth = scene.truth
        await kill(scene, tmp_path)
        async with asyncio.timeout(DEADLINE_S):
            while not truth.count("CRASHED"):
                await truth.poll()
        assert await scene.infer() is grpc.StatusCode.OK
        await truth.poll_until(lambda: "READY" in truth.reasons)
        assert all(p.said for p in truth.polls)


async def test_a_blocked_model_is_not_ready_however_it_is_asked(tmp_path: Path) -> None:
    """Crashes in a row block the model: BLOCKED is told, and nobody says ready until UnblockModel."""
    async with live(tmp_path, on_demand=True, real=False) as scene:
        truth, host = scene.truth, scene.running.host
        async with asyncio.timeout(DEADLINE_S):
            while "BLOCKED" not in truth.reasons:
                scene.running.blame("m")
                await truth.poll()
                await scene.infer()
                await truth.caught_up()
        await truth.poll()
        assert not truth.polls[-1].said
        await host.residency.unblock("m")
        await truth.poll()
        assert truth.polls[-1].said


async def test_a_model_that_fails_its_checks_is_not_ready_until_it_is_loaded_anew(
    tmp_path: Path,
) -> None:
    """From the bad canary on everybody says no, also when it cannot come back; a good load ends that."""
    sign = tmp_path / "sick"
    async with live(tmp_path, on_demand=True, check=f"file:{sign}") as scene:
        truth = scene.truth
        await truth.poll()
        assert truth.polls[-1].said
        sign.touch()
        await truth.poll_until(lambda: "LOAD_FAILED" in truth.reasons)
        assert not truth.polls[-1].said
        await truth.caught_up()
        assert truth.reasons.index("HEALTH") < truth.reasons.index("UNHEALTHY")
        sign.unlink()
        await scene.running.load("m")
        await truth.poll()
        assert truth.polls[-1].said


async def test_a_daemon_that_drains_says_so_everywhere(tmp_path: Path) -> None:
    """Once it stops, the health of the daemon is no on gRPC and 503 on HTTP, calls under way end."""
    async with live(tmp_path, on_demand=True) as scene:
        gate = tmp_path / "gate"
        waiting = asyncio.ensure_future(scene.infer(f"wait:{gate}"))
        async with asyncio.timeout(DEADLINE_S):
            while not list(tmp_path.glob("gate.*.started")):
                await scene.truth.poll()
        stopping = asyncio.ensure_future(scene.server.stop(DEADLINE_S))
        await asyncio.sleep(0)
        assert await scene.truth.healthz() == 503
        assert not await scene.truth.check("")
        assert not await scene.truth.check("model/m")
        gate.touch()
        assert await waiting is grpc.StatusCode.OK
        await stopping
        assert await scene.truth.healthz() == 503


# --- the judge itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poll", "right"),
    [
        (Poll("x", True, 5, 5), True),
        (Poll("x", False, 5, 5), False),
        (Poll("x", True, 10, 10), False),
        (Poll("x", False, 12, 19), True),
        (Poll("x", True, 12, 19), False),
        (Poll("x", True, 9, 10), True),
        (Poll("x", False, 9, 10), True),
        (Poll("x", False, 20, 25), False),
    ],
)
async def test_an_answer_that_lags_or_leads_is_found(poll: Poll, right: bool) -> None:
    """READY at 1, gone at 10, READY again at 20: only what some state of its time says is right."""
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        truth = Truth(channel, _never, _never)
        truth.states = [(1, State.READY), (10, None), (15, State.LOADING), (20, State.READY)]
        truth.polls = [poll]
        with contextlib.nullcontext() if right else pytest.raises(AssertionError):
            truth.judge()


async def _never() -> int:
    raise AssertionError
