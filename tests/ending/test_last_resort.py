"""What should never happen while the daemon ends, and what impatient people do: it ends all the same."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from tests.api.serving import info_of
from tests.ending.scene import CALL_S, Watcher, scene
from tests.support import DEADLINE_S, wait_until

# Not the daemon as it is: parts of it that hang as no test can make them.
PROGRAM = """
import asyncio, sys, time
from modelhostd import __main__, daemon

stop_parts = daemon.Daemon._stop_parts

async def step(self, grace_s):
    await asyncio.Event().wait()

async def loop(self, grace_s):
    time.sleep(3600)

async def thread(self, grace_s):
    await stop_parts(self, grace_s)
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)

async def task(self, grace_s):
    async def stubborn():
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                continue
    await stop_parts(self, grace_s)
    self.stubborn = asyncio.ensure_future(stubborn())
    await asyncio.sleep(0)

daemon.Daemon._stop_parts = globals()[sys.argv.pop(1)]
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("what", ["step", "loop", "thread", "task"])
def test_nothing_that_hangs_keeps_the_process(short_path: Path, what: str) -> None:
    """A step that never ends, a loop that is stuck, a thread or a task left over: exit 75 at the deadline."""
    address = short_path / "s"
    command = [sys.executable, "-c", PROGRAM, what, "--home", str(short_path / "home")]
    command += ["--grpc", f"unix:{address}", "--http", "off", "--set", "worker.backends=identity"]
    for step, seconds in (("drain", 0), ("worker", 0), ("exit", 1)):
        command += ["--set", f"shutdown.{step}_timeout_s={seconds}"]
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(short_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: address.exists() or process.poll() is not None)
            with grpc.insecure_channel(f"unix:{address}") as channel:
                grpc.channel_ready_future(channel).result(DEADLINE_S)
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 75
        finally:
            process.kill()


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_waiting(again: int) -> None:
    """Asked twice, it waits no longer for what is in flight, which is told, and ends in order."""
    with scene(
        *("--set", "shutdown.drain_timeout_s=3000", "--set", "shutdown.worker_timeout_s=0")
    ) as at:
        at.loaded()
        watcher, call = Watcher(at.channel(), 0), at.inferring()
        workers = at.workers()
        assert at.daemon.process is not None
        at.daemon.process.send_signal(signal.SIGTERM)
        watcher.ended()
        assert not call.done()
        assert at.daemon.end(again) == 0
        assert info_of(call.exception(CALL_S)).reason == "SHUTTING_DOWN"
        at.check_ended(workers)
