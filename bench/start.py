"""From exec to READY, and what an idle daemon holds: empty, and with 1,000 models and 100,000 events.

READY is the datagram that systemd gets. The daemon runs with its defaults but for its listeners, which are unix
sockets. The reference is the bare gRPC server of this folder, from exec until it serves.
"""

import asyncio
import dataclasses
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import loop_lag, process_use
from bench.figure import Effort, Figure
from bench.hot_path import BARE, bare_server
from modelhostd.adapters.database import FILE_NAME, SqliteDatabase
from modelhostd.core.resources import Event, Kind, Model, Source
from modelhostd.ports import Batch, Change

MIB = 2**20
MODELS, EVENTS_EACH = 1_000, 100
EMPTY_S, FULL_S, RSS_MIB = 0.4, 1.0, 90.0
LAG_LIMIT_MS = 10.0
IDLE_S = 2.0
DEADLINE_S = 60.0


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure starts in turns."""
    empty: list[float] = []
    full: list[float] = []
    bare: list[float] = []
    cpu: list[float] = []
    rss: list[float] = []
    lags: list[float] = []
    bare_cpu: list[float] = []
    bare_rss: list[float] = []
    with tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch:
        folder = Path(scratch)
        # Both run once before: as in an installation, nothing is compiled when it counts.
        with (
            started(folder, "full"),
            bare_server(BARE, folder / "bare", environment=with_bytecode(folder)),
        ):
            pass
        asyncio.run(
            fill(folder / "full" / FILE_NAME, max(20, int(MODELS * min(1.0, effort.scale))))
        )
        for number in range(effort.rounds):
            with started(folder, f"empty-{number}") as (seconds, pid):
                empty.append(seconds)
                cpu.append(process_use.cpu_s(pid))
                time.sleep(IDLE_S * min(1.0, effort.scale))
                rss.append(process_use.rss_bytes(pid) / MIB)
            with started(folder, "full") as (seconds, _):
                full.append(seconds)
            # Once more for the loop's lag: what measures it would count as the start's.
            lag = folder / "lag"
            with started(folder, "full", lag):
                time.sleep(IDLE_S * min(1.0, effort.scale))
            lags += loop_lag.lags(lag, 0.0, time.monotonic())
            begun = time.perf_counter()
            bare_folder = folder / f"bare-{number}"
            with bare_server(BARE, bare_folder, environment=with_bytecode(folder)) as server:
                bare.append(time.perf_counter() - begun)
                bare_cpu.append(server.cpu_s())
                bare_rss.append(process_use.rss_bytes(server.pids[0]) / MIB)
    now, later, used, memory = map(statistics.median, (empty, full, cpu, rss))
    of_bare, bare_used, bare_memory = map(statistics.median, (bare, bare_cpu, bare_rss))
    what = f"{MODELS:,} models and {MODELS * EVENTS_EACH:,} events"
    return [
        Figure("start to READY, empty", now, "s", EMPTY_S, reference=of_bare, expected="0.33 s"),
        Figure(f"start to READY, {what}", later, "s", FULL_S, reference=of_bare, expected="0.4 s"),
        Figure("start to READY, empty, CPU time", used, "s", reference=bare_used),
        Figure(
            f"start with {what} and idle, loop lag p99", loop_lag.p99_ms(lags), "ms", LAG_LIMIT_MS,
            expected="below 5 ms on a quiet machine",
        ),
        Figure("RSS, idle", memory, "MiB", RSS_MIB, reference=bare_memory, expected="70 MiB"),
    ]  # fmt: skip


@contextmanager
def started(folder: Path, home: str, lag: Path | None = None) -> Iterator[tuple[float, int]]:
    """Start the daemon; yields the seconds until READY and its process id, and ends it.

    ``lag``: where to note how late its loop is, from its first turn on.
    """
    notify = folder / "notify"
    notify.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(notify))
        listener.settimeout(DEADLINE_S)
        environment = {
            **with_bytecode(folder),
            "NOTIFY_SOCKET": str(notify),
            "RUNTIME_DIRECTORY": str(folder),
        }
        program = ["-m", "modelhostd"] if lag is None else [loop_lag.__file__, str(lag)]
        command = [sys.executable, *program, "--home", str(folder / home)]
        command += ["--grpc", f"unix:{folder}/modelhost.sock", "--http", "off"]
        command += ["--log-level", "warning"]
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=environment)
        try:
            while b"READY=1" not in listener.recv(65536):
                pass
            yield time.perf_counter() - begun, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_S)


def with_bytecode(folder: Path) -> dict[str, str]:
    """Return an environment in which Python keeps what it compiles, as in an installation."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


async def fill(path: Path, models: int) -> None:
    """Write models and the events that made them into the database of a home that no daemon uses."""
    database = SqliteDatabase(path)
    sequence = (await database.open()).last_sequence
    now = time.time()
    for number in range(models):
        source = Source(f"hf://bench/model-{number}")
        model = Model(f"model-{number}", uuid.uuid4().hex, source, now, now)
        events = []
        for edit in range(1, EVENTS_EACH + 1):
            sequence += 1
            model = dataclasses.replace(model, edit=edit, description=f"edit {edit}")
            created = edit == 1
            events.append(Event(sequence, now, Kind.MODEL, model.id, model, created=created))
        await database.commit(Batch((Change(Kind.MODEL, model.id, model),), tuple(events)))
    await database.close()
