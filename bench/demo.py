"""The whole main job on a real model, on this machine alone: ``make demo``.

Starts a hub on loopback that serves the real all-MiniLM-L6-v2 and a small random classifier over the Hub's
protocol, and the unchanged daemon beside it. Then: pull with progress, load, embed (checked against the bare
library), evict, come back, while a subscriber prints every event. Then four models take turns on a simulated
device that has room for two: what leaves it stays in host memory, and is back in milliseconds. Exit code 0
only if every step held.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Run as a script, `python bench/demo.py`: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.loopback_hub import LoopbackHub, Repo
from bench.models import SENTENCES, make_classifier, minilm_dir, reference_embeddings
from modelhost import Client, Unreachable
from modelhost.v1.events_pb2 import Event
from modelhost.v1.instances_pb2 import Instance
from modelhost.v1.operations_pb2 import Operation

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
CLASSIFIER = "modelhost/tiny-classifier"
MOODS = ("mood-1", "mood-2", "mood-3", "mood-4")
SIM_BYTES = 2**30
TOLERANCE = 1e-4
START_S = 120.0
STOP_S = 40.0


def main() -> int:
    """Run the demo; returns 0 if everything was as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", metavar="DIR", help="keep the daemon's home in DIR")
    parser.add_argument("--rate", type=int, default=40_000_000, help="the hub's bytes per second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelhost-demo-") as scratch:
        home = Path(arguments.keep).absolute() if arguments.keep else Path(scratch, "home")
        say("models", "all-MiniLM-L6-v2 (real weights) and five small random classifiers")
        make_classifier(Path(scratch, "classifier"))
        repos = {
            MINILM: Repo.from_folder(
                minilm_dir(), pipeline_tag="sentence-similarity", licence="apache-2.0"
            ),
            CLASSIFIER: Repo.from_folder(
                Path(scratch, "classifier"), pipeline_tag="text-classification"
            ),
        }
        for number, name in enumerate(MOODS):
            folder = make_classifier(Path(scratch, name), seed=number)
            repos[f"modelhost/{name}"] = Repo.from_folder(
                folder, pipeline_tag="text-classification"
            )
        with (
            LoopbackHub(repos, rate=arguments.rate) as hub,
            daemon(home, hub.endpoint, Path(scratch, "s")) as (users, operators),
            Client(users) as host,
            Client(operators) as operator,
        ):
            return job(host, operator)


def job(host: Client, operator: Client) -> int:
    """Do the main job against a running daemon; budgets are the operator's."""
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(host, stop), daemon=True)
    watcher.start()

    say("pull", f"hf://{MINILM}")
    host.add(f"hf://{MINILM}", "all-minilm-l6-v2", config={"device": "devices/cpu"})
    host.pull("all-minilm-l6-v2", progress=Bar())
    say("load", "in a worker process on devices/cpu")
    host.load("all-minilm-l6-v2")
    found = host.embed("all-minilm-l6-v2", SENTENCES)
    expected = reference_embeddings(minilm_dir(), SENTENCES)
    worst = float(abs(found - expected).max())
    say("embed", f"{found.shape[0]} sentences -> {found.shape[1]} numbers each")
    say("check", f"largest difference from the bare library {worst:.1e} (allowed {TOLERANCE:g})")

    say("pull", f"hf://{CLASSIFIER}")
    host.add(f"hf://{CLASSIFIER}", "tiny-classifier", config={"device": "devices/cpu"})
    host.pull("tiny-classifier", progress=Bar())
    used = measured(host, "all-minilm-l6-v2")
    say("budget", f"devices/cpu: {used} bytes, room for one of the two")
    operator.set_budget("cpu", used)
    host.load("tiny-classifier")
    gone = "all-minilm-l6-v2" not in resident(host)
    say("evict", f"resident now: {', '.join(resident(host))}")

    started = time.monotonic()
    again = host.embed("all-minilm-l6-v2", SENTENCES)
    say("return", f"a request brought it back in {time.monotonic() - started:.2f} s")
    same = bool((again == found).all())
    back = resident(host) == ["all-minilm-l6-v2"]
    good = worst <= TOLERANCE and gone and same and back
    stop.set()
    good = take_turns(host, operator) and good
    say("result", "everything as promised" if good else "NOT as promised")
    return 0 if good else 1


def take_turns(host: Client, operator: Client) -> bool:
    """Ask four models in turn where there is room for two; return whether all answered as before."""
    say("four", f"{', '.join(MOODS)} on devices/sim-0")
    first = {}
    for name in MOODS:
        host.add(f"hf://modelhost/{name}", name, config={"device": "devices/sim-0"})
        host.pull(name)
        first[name] = ask(host, name)
    room = 2 * measured(host, MOODS[-1])
    operator.set_budget("sim-0", room)
    say("budget", f"devices/sim-0: {room} bytes, room for two of the four")
    same = True
    for name in (*MOODS, *MOODS):
        settled(host)
        was = resident(host)
        started = time.monotonic()
        same = ask(host, name) == first[name] and same
        took_ms = (time.monotonic() - started) * 1e3
        settled(host)
        left = ", ".join(m for m in was if m not in resident(host)) or "nobody"
        swap_ms = host.instance(name).load_duration.ToNanoseconds() / 1e6
        size_mb = measured(host, name) / 1e6
        say(
            "switch",
            f"{name} for {left}: {size_mb:.0f} MB in {swap_ms:.1f} ms, answered after {took_ms:.0f} ms",
        )
    return same


def settled(host: Client) -> None:
    """Wait until nothing is on its way to or from a device."""
    moving = (Instance.QUEUED, Instance.LOADING, Instance.DRAINING)
    end = time.monotonic() + START_S
    while any(i.state in moving for i in host.instances()) and time.monotonic() < end:
        time.sleep(0.01)


def ask(host: Client, name: str) -> list[float]:
    """Return the scores that a classifier gives the first sentence."""
    (found,) = host.classify(name, SENTENCES[:1])
    return [one.score for one in sorted(found.labels, key=lambda one: one.index)]


def resident(host: Client) -> list[str]:
    """Return the ids of the models that are READY."""
    return sorted(i.model.removeprefix("models/") for i in host.instances() if i.state == i.READY)


def measured(host: Client, model: str) -> int:
    """Return the bytes that a model's instance takes."""
    return next(i.measured_bytes for i in host.instances() if i.model == f"models/{model}")


def watch(host: Client, stop: threading.Event) -> None:
    """Print every event of models and instances, with its sequence."""
    with Client(host.target) as own:
        for event in own.watch(snapshot=False, kinds=("MODEL", "INSTANCE")):
            if stop.is_set():
                return
            if isinstance(event, Event):
                details = " ".join(f"{k}={v}" for k, v in sorted(event.details.items()))
                gone = "gone: " if event.change == event.DELETED else ""
                say(f"event {event.sequence}", f"{event.name} {gone}{event.reason} {details[:90]}")


class Bar:
    """Prints an operation's progress, one line a second and one at the beginning of each phase."""

    def __init__(self) -> None:
        self._printed = 0.0
        self._phase = 0

    def __call__(self, operation: Operation) -> None:
        """Print the operation's progress, if it is time."""
        progress = operation.progress
        now = time.monotonic()
        if progress.phase == self._phase and now - self._printed < 1.0:
            return
        self._printed, self._phase = now, progress.phase
        if progress.total_bytes:
            share = progress.done_bytes / progress.total_bytes
            rate = progress.bytes_per_second / 1e6
            name = progress.Phase.Name(progress.phase).lower() if progress.phase else "done"
            say("progress", f"{name} {share:5.0%} of {progress.total_bytes} bytes, {rate:.0f} MB/s")


@contextmanager
def daemon(home: Path, endpoint: str, sockets: Path) -> Iterator[tuple[str, str]]:
    """Start the unchanged daemon; yields the users' and the operators' target, ends it with SIGTERM."""
    address = f"unix:{sockets}/modelhost.sock"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "RUNTIME_DIRECTORY": str(sockets)}
    sockets.mkdir(mode=0o700)
    command = [sys.executable, "-m", "modelhostd", "--home", str(home), "--grpc", address]
    command += ["--http", "off"]  # its usual port may be another daemon's
    command += ["--set", f"devices.sim_bytes={SIM_BYTES}"]
    say("daemon", " ".join(command[1:]))
    log = sockets.parent / "modelhostd.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--log-level", "warning"], env=environment, stderr=output
        )
        try:
            wait_until_serving(address, process)
            yield address, f"unix:{sockets}/admin.sock"
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=STOP_S)
            say("daemon", f"ended with exit code {code}")
            errors = log.read_text(errors="replace")
            if errors:
                sys.stderr.write(errors)


def wait_until_serving(address: str, process: "subprocess.Popen[bytes]") -> None:
    """Return when the daemon answers; raises RuntimeError when it ended or does not in time."""
    end = time.monotonic() + START_S
    with Client(address) as client:
        while process.poll() is None and time.monotonic() < end:
            try:
                if client.health() == "SERVING":
                    return
            except Unreachable:
                time.sleep(0.05)
    raise RuntimeError("the daemon did not start; its log follows")


def say(topic: str, text: str) -> None:
    """Print one line."""
    sys.stdout.write(f"{topic:>10}  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
