"""GetModel beside a bare grpc.aio unary echo whose message is as large as GetModel's answer."""

import statistics
import time
from collections.abc import Sequence

import grpc

from bench import loop_lag
from bench.figure import Effort, Figure
from bench.h2_load import Load
from bench.hot_path import BARE, MODEL, OURS, TUNED, servers
from bench.inference import Measured, lag_figure
from modelhost.v1 import model_service_pb2
from modelhost.v1.model_service_pb2_grpc import ModelServiceStub

GET = "/modelhost.v1.ModelService/GetModel"
ECHO = "/bench.Echo/Echo"
REQUESTS = 1500
LIMIT = 1.3


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure the median latency of one call after the other."""
    asked = model_service_pb2.GetModelRequest(name=f"models/{MODEL}")
    requests = max(20, int(REQUESTS * effort.scale))
    with servers() as targets:
        measured = {server.name: Measured() for server in targets}
        with grpc.insecure_channel(targets[-1].target) as channel:
            size = ModelServiceStub(channel).GetModel(asked).ByteSize()
        for number in range(effort.rounds + 1):
            for server in targets if number % 2 else reversed(targets):
                ours = server.name == OURS
                message = asked.SerializeToString() if ours else bytes(size)
                with Load(server.target, GET if ours else ECHO) as load:
                    load.run(message, concurrency=1, requests=5)
                    started = time.monotonic()
                    run = load.run(message, concurrency=1, requests=requests)
                if number:  # the first round warms everything up
                    kept = measured[server.name]
                    kept.latencies.append(run.percentile(0.5) * 1e6)
                    kept.lags += loop_lag.lags(server.lag, started, time.monotonic())
    bare, tuned, own = (measured[name] for name in (BARE, TUNED, OURS))
    p50, of_tuned, of_bare = (statistics.median(m.latencies) for m in (own, tuned, bare))
    name = f"GetModel of {size} bytes"
    return [
        Figure(f"{name}, p50", p50, "us", LIMIT, False, of_bare, True, "1.1x"),
        Figure("the same echo with our settings, p50", of_tuned, "us", reference=of_bare),
        lag_figure(name, own.lags, bare.lags),
    ]
