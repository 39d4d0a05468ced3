"""Who downloads in the benches: modelhost's own way, and its peers, each a process that is measured.

Those in Python measure themselves, from when their modules are imported and one question to the hub is answered:
a daemon has that behind it. As a program this is modelhost's client:

    python bench/download_clients.py FOLDER ENDPOINT REPO CONNECTIONS
"""

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: only the folder of this file is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CONNECTIONS = 8


@dataclass(frozen=True)
class Run:
    """One run of one client."""

    wall_s: float
    cpu_s: float


Client = Callable[[Path], Sequence[str]]
"""Takes the folder to download into; returns a command."""


def modelhost(endpoint: str, repo: str, connections: int = CONNECTIONS) -> Client:
    """Return modelhost's download path: plan, pump, digest, format check, durable, published."""
    return lambda folder: [
        sys.executable, __file__, str(folder), endpoint, repo, str(connections)
    ]  # fmt: skip


def hub_library(repo: str, file: str = "") -> Client:
    """Return huggingface_hub's own download over HTTP: of one file or, as ``hf download``, of a repository.

    It looks at sizes, not at digests.
    """
    call = (
        f"huggingface_hub.hf_hub_download({repo!r}, {file!r}, cache_dir=sys.argv[1])"
        if file
        else f"huggingface_hub.snapshot_download({repo!r}, cache_dir=sys.argv[1])"
    )
    code = (
        "import sys, time, huggingface_hub; "
        f"huggingface_hub.HfApi().model_info({repo!r}); "
        "wall, cpu = time.perf_counter(), time.process_time(); "
        f"{call}; "
        "print(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    return lambda folder: [sys.executable, "-c", code, str(folder)]


def aria2c(url: str, sha256: str, connections: int = CONNECTIONS) -> Client:
    """Return aria2c, which checks the digest in a second pass."""
    return lambda folder: [
        "aria2c", "-q", f"-x{connections}", f"-s{connections}", "-k1M", "--file-allocation=none",
        f"--checksum=sha-256={sha256}", "-d", str(folder), "-o", "file", url,
    ]  # fmt: skip


def aria2c_installed() -> bool:
    """Tell whether there is an aria2c (Debian: ``apt install aria2``)."""
    return shutil.which("aria2c") is not None


def in_turns(
    clients: Mapping[str, Client], rounds: int, scratch: Path, endpoint: str
) -> dict[str, Run]:
    """Run all clients in turns, each into a folder of its own that is removed; return medians.

    Raises CalledProcessError when one fails.
    """
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    runs: dict[str, list[Run]] = {name: [] for name in clients}
    folder = scratch / "out"
    for number in range(rounds):
        for name in list(clients)[:: -1 if number % 2 else 1]:
            try:
                runs[name].append(_measure(clients[name](folder), environment))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return {
        name: Run(
            statistics.median(run.wall_s for run in found),
            statistics.median(run.cpu_s for run in found),
        )
        for name, found in runs.items()
    }


def _measure(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.read().split()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    if len(told) == 2:  # it has measured itself
        return Run(float(told[0]), float(told[1]))
    return Run(wall_s, used.ru_utime + used.ru_stime)


async def download(folder: Path, endpoint: str, repo: str, connections: int) -> Run:
    """Be the client: download a repository into a fresh home."""
    from modelhostd.adapters.blobs import BlobStore, StoreConfig
    from modelhostd.adapters.downloads import HubDownloads
    from modelhostd.adapters.hub import HubConfig
    from modelhostd.adapters.transfer import StreamConfig
    from modelhostd.adapters.trees import TreeStore
    from modelhostd.core.resources import Source
    from modelhostd.ports import DownloadJob

    source = Source(f"hf://{repo}")
    store = BlobStore(StoreConfig(folder))
    downloads = HubDownloads(
        HubConfig(endpoint=endpoint),
        store,
        TreeStore(store),
        streams=StreamConfig(connections=connections),
    )
    await downloads.inspect(source)
    wall, cpu = time.perf_counter(), time.process_time()
    await downloads.fetch(DownloadJob("op", "model", 1, source, {}), lambda _: None)
    return Run(time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    """Download and print seconds and seconds of processor time."""
    folder, endpoint, repo, connections = sys.argv[1:]
    run = asyncio.run(download(Path(folder), endpoint, repo, int(connections)))
    sys.stdout.write(f"{run.wall_s} {run.cpu_s}\n")


if __name__ == "__main__":
    main()
