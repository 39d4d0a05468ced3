"""Downloads measured beside their peers: one large file, many small ones, connections that are slow each.

Each client is a process of its own, the rounds are interleaved, medians are shown with the client's CPU
seconds beside. Those in Python are measured from when their imports are done: a daemon has them behind it. Needs nginx and aria2c (Debian: ``apt install nginx-light aria2``); what is not there is
left out::

    python bench/downloads.py --bytes 2147483648 --rounds 3
"""

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: only the folder of this file is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.loopback_hub import LoopbackHub, Repo

REPO = "bench/model"
NGINX = """
{user} worker_processes 1; daemon off; pid {root}/nginx.pid; error_log {root}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000; default_type application/octet-stream;
  client_body_temp_path {root}; proxy_temp_path {root}; fastcgi_temp_path {root};
  uwsgi_temp_path {root}; scgi_temp_path {root};
  server {{ listen 127.0.0.1:{port}; root {files}; {limit} }}
}}
"""


@dataclass(frozen=True)
class Run:
    """One run of one client."""

    wall_s: float
    cpu_s: float


Client = Callable[[Path], list[str]]


def measure(command: list[str], environment: dict[str, str]) -> Run:
    """Run a client to its end; raises CalledProcessError when it fails.

    One that prints seconds and CPU seconds has measured itself.
    """
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.read().split()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    if len(told) == 2:
        return Run(float(told[0]), float(told[1]))
    return Run(wall_s, used.ru_utime + used.ru_stime)


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Nginx:
    """nginx on a port of loopback, each connection limited to ``rate`` bytes a second (0 = not)."""

    def __init__(self, root: Path, files: Path, rate: int = 0) -> None:
        self.port = free_port()
        limit = f"limit_rate {rate};" if rate else ""
        # Its workers would be another user's, who may not read what only root may.
        user = "user root;" if os.geteuid() == 0 else ""
        root.mkdir()
        config = root / "nginx.conf"
        config.write_text(
            NGINX.format(root=root, files=files, port=self.port, limit=limit, user=user)
        )
        self._process = subprocess.Popen(
            ["nginx", "-p", str(root), "-c", str(config)], stderr=subprocess.DEVNULL
        )

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(10)


def by_modelhost(endpoint: str) -> Client:
    """Return modelhost's download path: plan, pump, digest, format check, durable, published."""
    return lambda folder: [sys.executable, __file__, "--client", str(folder), endpoint]


def by_hub_library() -> Client:
    """Return huggingface_hub's own download over HTTP: sizes only, no digest."""
    code = (
        "import sys, time; from huggingface_hub import snapshot_download; "
        "wall, cpu = time.perf_counter(), time.process_time(); "
        f"snapshot_download({REPO!r}, cache_dir=sys.argv[1]); "
        "print(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    return lambda folder: [sys.executable, "-c", code, str(folder)]


def by_aria2c(url: str, sha256: str) -> Client:
    """Return aria2c with eight connections, which checks the digest in a second pass."""
    return lambda folder: [
        "aria2c", "-q", "-x8", "-s8", "-k1M", "--file-allocation=none",
        f"--checksum=sha-256={sha256}", "-d", str(folder), "-o", "file", url,
    ]  # fmt: skip


async def download(folder: Path, endpoint: str) -> None:
    """Be the client: download the repository into a fresh home."""
    from modelhostd.adapters.blobs import BlobStore, StoreConfig
    from modelhostd.adapters.downloads import HubDownloads
    from modelhostd.adapters.hub import HubConfig
    from modelhostd.adapters.hub_library import library
    from modelhostd.adapters.trees import TreeStore
    from modelhostd.core.resources import Source
    from modelhostd.ports import DownloadJob

    library()
    wall, cpu = time.perf_counter(), time.process_time()
    store = BlobStore(StoreConfig(folder))
    downloads = HubDownloads(HubConfig(endpoint=endpoint), store, TreeStore(store))
    job = DownloadJob("op", "model", 1, Source(f"hf://{REPO}"), {})
    await downloads.fetch(job, lambda _: None)
    print(time.perf_counter() - wall, time.process_time() - cpu)


def write_weights(path: Path, size: int) -> str:
    """Write a safetensors file with one tensor of ``size`` random bytes; return its SHA-256."""
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    sha256 = hashlib.sha256(struct.pack("<Q", len(header)) + header)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for left in range(size, 0, -(16 << 20)):
            piece = os.urandom(min(left, 16 << 20))
            sha256.update(piece)
            file.write(piece)
    return sha256.hexdigest()


def compare(title: str, size: int, clients: dict[str, Client], rounds: int, scratch: Path) -> None:
    """Run all clients in turns and print medians."""
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    runs: dict[str, list[Run]] = {name: [] for name in clients}
    for _ in range(rounds):
        for name, client in clients.items():
            folder = scratch / "out"
            runs[name].append(measure(client(folder), environment))
            shutil.rmtree(folder)
    print(f"\n{title}\n\n| client | MB/s | s | CPU s |\n|---|---|---|---|")
    for name, found in runs.items():
        wall = statistics.median(run.wall_s for run in found)
        cpu = statistics.median(run.cpu_s for run in found)
        print(f"| {name} | {size / wall / 1e6:.0f} | {wall:.2f} | {cpu:.2f} |")


def large(scratch: Path, size: int, rounds: int, rate: int) -> None:
    """One large file, as fast as it goes or with slow connections."""
    files, folder = scratch / "files", scratch / "repo"
    files.mkdir()
    folder.mkdir()
    sha256 = write_weights(folder / "model.safetensors", size)
    os.link(folder / "model.safetensors", files / sha256)
    server = Nginx(scratch / "nginx", files, rate)
    try:
        with LoopbackHub({REPO: Repo.from_folder(folder)}) as hub:
            hub.cdn_base = f"http://127.0.0.1:{server.port}"
            os.environ["HF_ENDPOINT"] = hub.endpoint
            clients = {"modelhost, SHA-256": by_modelhost(hub.endpoint)}
            if shutil.which("aria2c"):
                clients["aria2c -x8, SHA-256"] = by_aria2c(f"{hub.cdn_base}/{sha256}", sha256)
            clients["huggingface_hub, no digest"] = by_hub_library()
            shown = f", {rate / 1e6:g} MB/s per connection" if rate else ""
            compare(f"One file of {size / 1e9:.1f} GB{shown}", size, clients, rounds, scratch)
    finally:
        server.stop()


def small(scratch: Path, count: int, size: int, rounds: int) -> None:
    """Many small files."""
    folder = scratch / "repo"
    folder.mkdir()
    for number in range(count):
        (folder / f"part-{number:03}.json").write_bytes(b'{"%d": "%b"}' % (number, b"x" * size))
    with LoopbackHub({REPO: Repo.from_folder(folder)}) as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
        clients = {
            "modelhost, digests": by_modelhost(hub.endpoint),
            "huggingface_hub, none": by_hub_library(),
        }
        compare(f"{count} files of {size} bytes", count * size, clients, rounds, scratch)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", nargs=2, metavar=("FOLDER", "ENDPOINT"), help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, default=2 << 30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=0, help="bytes a second of each connection")
    parser.add_argument("--only", choices=("large", "small"))
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    if arguments.client:
        asyncio.run(download(Path(arguments.client[0]), arguments.client[1]))
        return
    for name in ("large", "small"):
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
                if name == "large":
                    large(Path(scratch), arguments.bytes, arguments.rounds, arguments.rate)
                else:
                    small(Path(scratch), 200, 100_000, arguments.rounds)


if __name__ == "__main__":
    main()
