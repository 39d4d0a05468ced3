"""How tests and the soak run the programs of this folder, and the repositories that these download."""

import contextlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.loopback_hub import Fault, LoopbackHub, Repo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MEMORY = Path("/dev/shm")
ROOM_BYTES = 2**30
"""What a program may take: a container has 64 MiB there, as a rule."""
BROKEN = "org/r3", "v2"
"""What is served with a flipped bit, each time: it must never become a model."""


LARGE = "org/large"
LARGE_BYTES = 1_500_000


def large() -> dict[str, bytes]:
    """Return the files of ``LARGE``: the weights alone, so that each byte can be accounted for."""
    return {"model.safetensors": _weights(LARGE_BYTES, 7)}


def repositories() -> dict[str, Repo]:
    """Return small repositories that share a file, each in two revisions, and a large one."""
    repos = {LARGE: Repo(large())}
    for number in range(4):
        repo = Repo(_files(number))
        repo.commit(_files(number + 100), branch="v2")
        repos[f"org/r{number}"] = repo
    return repos


def _weights(size: int, seed: int) -> bytes:
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    tensor = random.Random(seed).randbytes(size)
    return struct.pack("<Q", len(header)) + header + tensor


def _files(seed: int) -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "bert"}',
        "model.safetensors": _weights(1000 + seed, seed),
        "nested/shared.txt": b"shared" * 50,
    }


@contextlib.contextmanager
def serving() -> Iterator[LoopbackHub]:
    """Serve the repositories, with one file that never has the digest that is announced."""
    repos = repositories()
    name, branch = BROKEN
    repo = repos[name]
    weights = repo.commits[repo.refs[branch]]["model.safetensors"]
    with LoopbackHub(repos) as hub:
        hub.fault(Fault(f"*{weights.sha256}*", where="cdn", times=1 << 30, corrupt_at=500))
        yield hub


@contextlib.contextmanager
def memory() -> Iterator[Path]:
    """Give a folder with a short path, in memory where there is room.

    SIGKILL takes nothing of it, and syncs cost nothing.
    """
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM_BYTES
    place = MEMORY if roomy else None
    path = Path(tempfile.mkdtemp(prefix="mh-kill-", dir=place))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class ProgramFailed(AssertionError):
    """A program found a broken promise, or broke; the text is what it wrote."""


def run(program: str, *arguments: object, timeout_s: float, source: Path = ROOT) -> dict[str, Any]:
    """Run a program of this folder and return the totals that it prints; raises ProgramFailed.

    ``source`` is the checkout that is run, program and daemon alike.
    """
    paths = [str(source / name) for name in ("server", "client", ".")]
    done = subprocess.run(
        [sys.executable, str(source / HERE.relative_to(ROOT) / program), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise ProgramFailed(f"{program} {arguments}: {done.returncode}\n{done.stderr[-8000:]}")
    totals: dict[str, Any] = json.loads(done.stdout)
    return totals


def run_parts(
    program: str, parts: Sequence[Sequence[object]], *, timeout_s: float
) -> list[dict[str, Any]]:
    """Run a program several times side by side: it mostly waits. Raises the first ProgramFailed."""
    with ThreadPoolExecutor(len(parts)) as pool:
        runs = [pool.submit(run, program, *part, timeout_s=timeout_s) for part in parts]
        return [run.result() for run in runs]
