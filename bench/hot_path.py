"""ModelInfer of an identity model through daemon and worker, beside a bare grpc.aio servicer.

Both run at once and take turns, case by case and round by round, so that what the machine does meanwhile
meets both; ratios are of medians. Read ratios, not rates. ``make bench`` or::

    python bench/hot_path.py --rounds 5
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Run as a script, `python bench/hot_path.py`: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpc

from bench.demo import daemon
from bench.h2_load import Load, Measured
from bench.loopback_hub import LoopbackHub, Repo
from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import (
    host_service_pb2,
    model_service_pb2,
    models_pb2,
    operation_service_pb2,
    operations_pb2,
    residency_service_pb2,
)
from modelhost.v1.host_service_pb2_grpc import HostServiceStub
from modelhost.v1.model_service_pb2_grpc import ModelServiceStub
from modelhost.v1.operation_service_pb2_grpc import OperationServiceStub
from modelhost.v1.residency_service_pb2_grpc import ResidencyServiceStub

PATH = "/inference.GRPCInferenceService/ModelInfer"
MODEL = "identity"
MIB = 1024 * 1024


@dataclass(frozen=True)
class Case:
    """One measurement: its name, bytes of the tensor, requests at a time, requests in a round."""

    name: str
    tensor_bytes: int
    concurrency: int
    requests: int
    goal: float
    """What the daemon's rate shall be at least, as a share of the bare server's."""


CASES = (
    Case("16 floats, c=1", 64, 1, 2000, 0.85),
    Case("16 floats, c=16", 64, 16, 6000, 0.65),
    Case("1 MiB, c=1", MIB, 1, 150, 1.0),
    Case("1 MiB, c=16", MIB, 16, 250, 1.0),
)
BARE, TUNED, OURS = "bare", "bare, our settings", "modelhost"


def main() -> int:
    """Run the bench; returns 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="requests per round, times this")
    parser.add_argument("--json", action="store_true", help="print figures for a machine")
    arguments = parser.parse_args()
    with servers() as targets:
        found = measure(targets, arguments.rounds, arguments.scale)
    if arguments.json:
        print_json(found)
    else:
        print_table(found)
    return 0


def measure(
    targets: Mapping[str, str], rounds: int, scale: float
) -> Mapping[tuple[str, str], Sequence[Measured]]:
    """Return what each server did in each round of each case."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for round_number in range(rounds + 1):
        for case in CASES:
            for server, target in targets.items():
                message = request(case.tensor_bytes)
                requests = max(case.concurrency, int(case.requests * scale))
                with Load(target, PATH) as load:
                    load.run(message, concurrency=case.concurrency, requests=case.concurrency * 2)
                    run = load.run(message, concurrency=case.concurrency, requests=requests)
                if round_number:  # the first warms everything up
                    found.setdefault((case.name, server), []).append(run)
    return found


def request(tensor_bytes: int) -> bytes:
    """Return an encoded request with one FP32 tensor."""
    made = oip.ModelInferRequest(model_name=MODEL, id="1")
    made.inputs.add(name="INPUT0", datatype="FP32", shape=[1, tensor_bytes // 4])
    made.raw_input_contents.append(b"\0" * tensor_bytes)
    return made.SerializeToString()


# --- the servers ------------------------------------------------------------------------------------


@contextmanager
def servers() -> Iterator[Mapping[str, str]]:
    """Start the three servers; yields where each listens."""
    with (
        tempfile.TemporaryDirectory(prefix="modelhost-bench-") as scratch,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(scratch)
        repo = Repo({"config.json": b"{}", "model.safetensors": safetensors()})
        hub = stack.enter_context(LoopbackHub({f"bench/{MODEL}": repo}))
        users, _ = stack.enter_context(daemon(folder / "home", hub.endpoint, folder / "s"))
        with_model(users)
        print_settings(users)
        bare = stack.enter_context(bare_server(f"unix:{folder}/bare.sock"))
        tuned = stack.enter_context(bare_server(f"unix:{folder}/tuned.sock", "--tuned"))
        yield {BARE: bare, TUNED: tuned, OURS: users}


@contextmanager
def bare_server(address: str, *flags: str) -> Iterator[str]:
    """Start the reference server."""
    script = Path(__file__).with_name("bare_server.py")
    process = subprocess.Popen(
        [sys.executable, str(script), address, *flags], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"serving\n":
            raise RuntimeError("the reference server did not start")
        yield address
    finally:
        process.kill()
        process.wait()


def safetensors() -> bytes:
    """Return a file with one small tensor: the identity model's weights."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


def with_model(target: str) -> None:
    """Register, download and load the identity model."""
    with grpc.insecure_channel(target) as channel:
        ModelServiceStub(channel).CreateModel(
            model_service_pb2.CreateModelRequest(
                model_id=MODEL,
                model=models_pb2.Model(
                    source=models_pb2.Source(uri=f"hf://bench/{MODEL}"),
                    config=models_pb2.ModelConfig(backend="identity"),
                ),
            )
        )
        name = f"models/{MODEL}"
        asked = model_service_pb2.DownloadModelRequest(name=name)
        finish(channel, ModelServiceStub(channel).DownloadModel(asked))
        load = residency_service_pb2.LoadModelRequest(name=name)
        finish(channel, ResidencyServiceStub(channel).LoadModel(load))


def print_settings(target: str) -> None:
    """Print which of the daemon's process settings act: on another libc or grpcio they may not."""
    with grpc.insecure_channel(target) as channel:
        host = HostServiceStub(channel).GetHost(host_service_pb2.GetHostRequest())
    for setting in host.process_settings:
        acts = "acts" if setting.effective else f"does not act: {setting.message}"
        print(f"# {setting.setting} = {setting.value}: {acts}", file=sys.stderr)


def finish(channel: grpc.Channel, operation: operations_pb2.Operation) -> None:
    """Wait for the good end of an operation."""
    asked = operation_service_pb2.WaitOperationRequest(name=operation.name)
    done = OperationServiceStub(channel).WaitOperation(asked)
    if done.state != operations_pb2.Operation.SUCCEEDED:
        raise RuntimeError(f"{done.name}: {done.error.message}")


# --- what came of it --------------------------------------------------------------------------------


def rate(found: Mapping[tuple[str, str], Sequence[Measured]], case: Case, server: str) -> float:
    """Return the median rate of a server in a case."""
    return statistics.median(run.rate for run in found[case.name, server])


def p99_ms(found: Mapping[tuple[str, str], Sequence[Measured]], case: Case, server: str) -> float:
    """Return the median over rounds of the 99th percentile of latency."""
    return statistics.median(run.percentile(0.99) * 1e3 for run in found[case.name, server])


def print_table(found: Mapping[tuple[str, str], Sequence[Measured]]) -> None:
    """Print rates, ratios and tails."""
    print(
        f"{'ModelInfer, identity':22}{'server':22}{'requests/s':>11}{'of bare':>9}{'goal':>6}{'p99 ms':>9}"
    )
    for case in CASES:
        bare = rate(found, case, BARE)
        for server in (BARE, TUNED, OURS):
            own = rate(found, case, server)
            goal = f"{case.goal:.2f}" if server == OURS else ""
            tail = p99_ms(found, case, server)
            print(f"{case.name:22}{server:22}{own:11.0f}{own / bare:9.2f}{goal:>6}{tail:9.2f}")


def print_json(found: Mapping[tuple[str, str], Sequence[Measured]]) -> None:
    """Print one JSON object per case and server."""
    for case in CASES:
        for server in (BARE, TUNED, OURS):
            print(
                json.dumps(
                    {
                        "case": case.name,
                        "server": server,
                        "requests_per_second": rate(found, case, server),
                        "share_of_bare": rate(found, case, server) / rate(found, case, BARE),
                        "goal": case.goal if server == OURS else None,
                        "p99_ms": p99_ms(found, case, server),
                    }
                )
            )


if __name__ == "__main__":
    sys.exit(main())
