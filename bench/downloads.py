"""Downloads beside their peers: one large file, many small ones, a line that is long and narrow.

Each client is a process of its own; the rounds are interleaved; CPU time is the client's. The server of large files is
nginx (without one, the loopback hub's own), the line a proxy of ours (`shaping_proxy.py`). The daemon's figures are taken
while it fetches the same file as fast as it can (`download_daemon.py`). Everything is on a tmpfs where there is room,
which no disk slows down; each figure says where it was.

    python bench/downloads.py --bytes 2147483648 --rounds 3 --scratch /dev/shm
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import download_clients as clients
from bench import download_daemon, file_server
from bench.figure import COLUMNS, Effort, Figure
from bench.loopback_hub import LoopbackHub, Repo
from bench.shaping_proxy import shaped

BYTES = 2 << 30
BYTES_MIN = 256 << 20
"""Less is over before a cancel comes."""
FAR_BYTES, FAR_BYTES_MIN = 512 << 20, 32 << 20
FAR_S, FAR_RATE = 0.02, 50_000_000
SMALL_FILES, SMALL_BYTES = 200, 100_000
ROOM = 3
"""How many times the large file there must be room for: it, a download, and one that is being removed."""
LARGE, FAR, SMALL = "bench/large", "bench/far", "bench/small"
WEIGHTS = "model.safetensors"
OURS, ALONE, LIBRARY, ARIA2 = "modelhost", "one connection", "huggingface_hub", "aria2c -x8"


@dataclass(frozen=True)
class Site:
    """What is served, and from where."""

    scratch: Path
    hub: LoopbackHub
    served: int
    """The port of 127.0.0.1 that has the large files."""
    sha256: dict[str, str]
    """Repository -> the digest of its large file, which is also its name there."""
    shown: str
    """On which kind of file system all this is, and what is missing."""


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure everything."""
    size = max(BYTES_MIN, int(BYTES * effort.scale))
    return list(measure(size, effort.rounds, _scratch(size), effort.scale))


def measure(size: int, rounds: int, scratch: Path, scale: float = 1.0) -> Iterator[Figure]:
    """Yield every figure, with a large file of ``size`` bytes below ``scratch``."""
    far = max(FAR_BYTES_MIN, int(FAR_BYTES * scale))
    with _site(scratch, size, far) as site:
        yield from _large(site, size, rounds)
        yield from _far(site, far, min(rounds, 3))
        yield from _small(site, rounds)
        yield from download_daemon.figures(
            site.hub, SMALL, LARGE, size, site.scratch, site.shown, scale
        )


def _large(site: Site, size: int, rounds: int) -> Iterator[Figure]:
    url = f"{site.hub.cdn}/{site.sha256[LARGE]}?signature={site.hub.signature}"
    peers = {
        OURS: clients.modelhost(site.hub.endpoint, LARGE),
        LIBRARY: clients.hub_library(LARGE, WEIGHTS),
    }
    if clients.aria2c_installed():
        peers[ARIA2] = clients.aria2c(url, site.sha256[LARGE])
    runs = clients.in_turns(peers, rounds, site.scratch, site.hub.endpoint)
    name = f"{size / 2**30:.2g} GiB with SHA-256{site.shown}"
    rates = {peer: size / 1e6 / run.wall_s for peer, run in runs.items()}
    cpu = {peer: run.cpu_s for peer, run in runs.items()}
    beside = ARIA2 if ARIA2 in runs else f"{ARIA2} (not installed)"
    yield Figure(
        f"{name}, beside {beside} with its", rates[OURS], "MB/s", 1.0, True,
        rates.get(ARIA2), True, "1.6x",
    )  # fmt: skip
    yield Figure(
        f"{name}, CPU time, beside {beside}", cpu[OURS], "s", 0.7, False,
        cpu.get(ARIA2), True, "0.65x",
    )  # fmt: skip
    yield Figure(
        f"{name}, beside hf_hub_download without", rates[OURS], "MB/s", 1.5, True,
        rates[LIBRARY], True, "1.6x",
    )  # fmt: skip
    yield Figure(
        f"{name}, CPU time, beside hf_hub_download", cpu[OURS], "s",
        reference=cpu[LIBRARY], expected="0.7x",
    )  # fmt: skip


def _far(site: Site, size: int, rounds: int) -> Iterator[Figure]:
    with shaped(site.served, delay_s=FAR_S, rate=FAR_RATE) as port, _through(site.hub, port):
        url = f"{site.hub.cdn}/{site.sha256[FAR]}?signature={site.hub.signature}"
        peers = {
            OURS: clients.modelhost(site.hub.endpoint, FAR),
            ALONE: clients.modelhost(site.hub.endpoint, FAR, 1),
        }
        if clients.aria2c_installed():
            peers[ARIA2] = clients.aria2c(url, site.sha256[FAR])
        runs = clients.in_turns(peers, rounds, site.scratch, site.hub.endpoint)
    rates = {peer: size / 1e6 / run.wall_s for peer, run in runs.items()}
    name = (
        f"{size / 2**20:.0f} MiB over {FAR_S * 1e3:g} ms and {FAR_RATE / 1e6:g} MB/s per connection"
    )
    yield Figure(
        f"{name}, beside one stream", rates[OURS], "MB/s", 3.0, True, rates[ALONE], True, "4.5x"
    )
    if ARIA2 in rates:
        yield Figure(f"{name}, beside {ARIA2}", rates[OURS], "MB/s", reference=rates[ARIA2])


def _small(site: Site, rounds: int) -> Iterator[Figure]:
    peers = {
        OURS: clients.modelhost(site.hub.endpoint, SMALL),
        LIBRARY: clients.hub_library(SMALL),
    }
    runs = clients.in_turns(peers, rounds, site.scratch, site.hub.endpoint)
    rates = {peer: SMALL_FILES / run.wall_s for peer, run in runs.items()}
    name = f"{SMALL_FILES} files of {SMALL_BYTES / 1e3:g} kB{site.shown}, beside hf download"
    yield Figure(name, rates[OURS], "/s", 1.0, True, rates[LIBRARY], True, "1.1x")
    cpu = {peer: run.cpu_s for peer, run in runs.items()}
    yield Figure(f"{name}, CPU time", cpu[OURS], "s", reference=cpu[LIBRARY], expected="0.7x")


# --- what is served -----------------------------------------------------------------------------------


@contextmanager
def _site(root: Path, size: int, far: int) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="mh-bench-", dir=root) as folder:
        scratch = Path(folder)
        files = scratch / "files"
        files.mkdir()
        repos, sha256 = {}, {}
        for repo, count in ((LARGE, size), (FAR, far)):
            place = scratch / repo.replace("/", "-")
            place.mkdir()
            sha256[repo] = write_weights(place / WEIGHTS, count)
            os.link(place / WEIGHTS, files / sha256[repo])
            repos[repo] = Repo.from_folder(place)
        many = {
            f"part-{number:03}.json": b'{"%d": "%b"}' % (number, b"x" * (SMALL_BYTES - 10))
            for number in range(SMALL_FILES)
        }
        with LoopbackHub({**repos, SMALL: Repo(many)}) as hub, contextlib.ExitStack() as stack:
            port = int(hub.cdn.rpartition(":")[2])
            shown = f", {_kind(scratch)}"
            if not file_server.installed():
                shown += ", nginx not installed"
            else:
                port = stack.enter_context(file_server.serving(scratch / "nginx", files))
                stack.enter_context(_through(hub, port))
            yield Site(scratch, hub, port, sha256, shown)


@contextmanager
def _through(hub: LoopbackHub, port: int) -> Iterator[None]:
    """Let the hub's large files come from another port of 127.0.0.1."""
    before, hub.cdn_base = hub.cdn_base, f"http://127.0.0.1:{port}"
    try:
        yield
    finally:
        hub.cdn_base = before


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


def _scratch(size: int) -> Path:
    """Return a tmpfs with room for the large file, or else the place for temporary files."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free >= ROOM * size
    return memory if fits else Path(tempfile.gettempdir())


def _kind(path: Path) -> str:
    """Return the kind of file system that a path is on."""
    found, longest = "?", 0
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if path.is_relative_to(place) and len(place) >= longest:
            found, longest = kind, len(place)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bytes", type=int, default=BYTES, help="of the large file")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--scratch", type=Path, help="where everything is; default: a tmpfs")
    given = parser.parse_args()
    scratch = given.scratch or _scratch(given.bytes)
    sys.stdout.write(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n")
    for figure in measure(given.bytes, given.rounds, scratch, given.bytes / BYTES):
        sys.stdout.write(f"| {' | '.join(figure.row())} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
