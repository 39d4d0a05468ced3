"""A program: commit in a child, kill it at a random moment, look, again. Run by test_database_kill.py.

``python database_kill_loop.py HOME ROUNDS SEED``. It is a process of its own with one thread, so that
it may fork: a fresh interpreter for each child would take most of the time. Prints one line of figures;
raises at the first promise that is broken.
"""

import asyncio
import os
import random
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from modelhostd.adapters import database_check
from modelhostd.adapters.database import FILE_NAME, SqliteDatabase
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.resources import Event, Kind, Model, Source
from modelhostd.ports import Batch, Change, RequestRecord, Stored

KEPT = 200
ACK = struct.Struct("<q")


def batch_after(sequence: int, chance: random.Random) -> Batch:
    """Return a batch of one to three models that all say the sequence of its last event."""
    count = chance.randint(1, 3)
    last = sequence + count
    models = [
        Model(f"m{n}", "uid", Source("hf://o/m"), 1.0, 2.0, edit=last, description="x" * 300)
        for n in range(3)
    ]
    return Batch(
        changes=tuple(Change(Kind.MODEL, model.id, model) for model in models),
        events=tuple(
            Event(sequence + n, 1.0, Kind.MODEL, models[n - 1].id, models[n - 1], "CHANGED")
            for n in range(1, count + 1)
        ),
        requests=(RequestRecord(f"r{last}", "f", f"s{last}", 1.0),),
        compact_before=max(0, last - KEPT),
    )


async def commit_for_ever(home: Path, acknowledged: int, chance: random.Random) -> None:
    """Commit batch after batch, several at once, writing each acknowledged sequence to a pipe."""
    database = SqliteDatabase(home / FILE_NAME, idle_s=0.002)
    sequence = (await database.open()).last_sequence
    os.write(acknowledged, ACK.pack(sequence))

    async def commit(batch: Batch) -> None:
        await database.commit(batch)
        os.write(acknowledged, ACK.pack(batch.events[-1].sequence))

    idle = asyncio.create_task(asyncio.Event().wait())
    while True:
        batches = []
        for _ in range(chance.randint(1, 4)):
            batches.append(batch_after(sequence, chance))
            sequence = batches[-1].events[-1].sequence
        await asyncio.gather(*(commit(batch) for batch in batches))
        if chance.random() < 0.25:
            # Idle for longer than the database waits before it copies its log.
            await asyncio.wait({idle}, timeout=0.003)


def acks(pipe: int) -> Iterator[int]:
    """Yield the sequences that the child acknowledged, until its end of the pipe is closed."""
    while data := os.read(pipe, ACK.size):
        yield ACK.unpack(data)[0]


def kill_one(home: Path, chance: random.Random) -> int | None:
    """Run a child, kill it, and return the last sequence it acknowledged (None: nothing)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            asyncio.run(commit_for_ever(home, writing, chance))
        finally:
            os._exit(1)
    os.close(writing)
    # Every other child dies early, perhaps while it makes or opens the database.
    wanted = chance.choice((0, chance.randint(1, 40)))
    last, seen = None, 0
    pause_s = chance.random() * 0.004
    source = acks(reading)
    while seen < wanted and (sequence := next(source, None)) is not None:
        last, seen = sequence, seen + 1
    # Waiting for the time or for the child's death, whichever comes first.
    select.select([], [], [], pause_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise AssertionError(f"the child ended by itself: {status}")
    for sequence in source:
        last = sequence
    os.close(reading)
    return last


def look(home: Path) -> Stored:
    """Open the database and return what it holds, after checking it against itself."""
    file = DatabaseFile(home / FILE_NAME)
    if findings := database_check.look(file.path, deep=True).findings:
        raise AssertionError(findings)
    stored = file.open()
    try:
        found = [
            event
            for n in range(2)
            for event in file.read_events(stored.first_sequence + 256 * n, 256)
        ]
    finally:
        file.close()
    expected = list(range(stored.first_sequence, stored.last_sequence + 1))
    if [event.sequence for event in found] != expected:
        raise AssertionError(f"the log has a gap: {[e.sequence for e in found]}, not {expected}")
    last = stored.last_sequence
    edits = {model.edit for model in stored.resources[Kind.MODEL].values()}  # type: ignore[union-attr]
    if edits != ({last} if last else set()):
        raise AssertionError(f"rows say {edits}, the log says {last}")
    if last and stored.requests[-1].answer != f"s{last}":
        raise AssertionError(f"requests say {stored.requests[-1]}, the log says {last}")
    return stored


def main(home: Path, rounds: int, seed: int) -> None:
    """Kill ``rounds`` children and check each time that nothing acknowledged is lost."""
    chance = random.Random(seed)
    acknowledged, store_id, began = 0, "", time.monotonic()
    for number in range(rounds):
        last = kill_one(home, chance)
        stored = look(home)
        if store_id and stored.store_id != store_id:
            raise AssertionError(f"round {number}: another store")
        if stored.last_sequence < max(acknowledged, last or 0):
            raise AssertionError(
                f"round {number}: {last} was acknowledged, {stored.last_sequence} is there"
            )
        acknowledged, store_id = stored.last_sequence, stored.store_id
    print(f"{rounds} kills, {acknowledged} events, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
