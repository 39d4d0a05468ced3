"""What a daemon says of a model while its worker is lost and replaced, beside what requests meet.

One thread asks each of ModelReady, grpc.health and the model itself, again and again. The death is told by the kernel
(pidfd), the return by the first request that is answered.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from bench.faulty_scene import CALL_S, Scene, wait_for
from modelhost.oip import open_inference_pb2 as oip
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub

PAUSE_S = 0.002


@dataclass(frozen=True)
class Said:
    """One answer, from when it was asked for until it came (monotonic seconds)."""

    begin: float
    end: float
    yes: bool


@dataclass
class Answers:
    """All answers about one model, by who gave them."""

    model: str
    said: dict[str, list[Said]] = field(default_factory=dict)

    def wrong_s(self, died: float) -> Mapping[str, float]:
        """Return how long each was wrong at most, in seconds: "yes" without a worker or "no" with one."""
        requests = self.said["requests"]
        back = next(s for s in requests if s.begin > died and s.yes)
        return {
            who: max(
                _wrong_yes(said, died), _wrong_no(said, back.end), _too_early(said, back, died)
            )
            for who, said in self.said.items()
            if who != "requests"
        }


def _first_no(said: list[Said], died: float) -> float:
    return next((s.begin for s in said if s.begin > died and not s.yes), died)


def _wrong_yes(said: list[Said], died: float) -> float:
    """Return how long after the death "yes" was still answered."""
    until = _first_no(said, died)
    return max((s.end - died for s in said if s.yes and died < s.begin < until), default=0.0)


def _wrong_no(said: list[Said], back: float) -> float:
    """Return how long after the first answered request "no" was still answered."""
    return max((s.end - back for s in said if not s.yes and s.begin > back), default=0.0)


def _too_early(said: list[Said], back: Said, died: float) -> float:
    """Return how long before the first request that was answered "yes" was answered again."""
    until = _first_no(said, died)
    return max((back.begin - s.end for s in said if s.yes and s.begin > until), default=0.0)


@contextmanager
def asking(scene: Scene, model: str) -> Iterator[Answers]:
    """Ask for as long as the block lasts."""
    stop = threading.Event()
    answers = Answers(model)
    ready = GRPCInferenceServiceStub(scene.channel).ModelReady
    check: Any = scene.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    asked = health_pb2.HealthCheckRequest(service=f"model/{model}").SerializeToString()
    request = oip.ModelReadyRequest(name=model)
    serving = health_pb2.HealthCheckResponse.SERVING
    questions: Mapping[str, Callable[[], bool]] = {
        "ModelReady": lambda: bool(ready(request, timeout=CALL_S).ready),
        "grpc.health": lambda: bool(check(asked, timeout=CALL_S).status == serving),
        "requests": lambda: scene.infer(model).exception() is None,
    }

    def ask(who: str, question: Callable[[], bool]) -> None:
        said = answers.said[who] = []
        while not stop.wait(PAUSE_S):
            begin = time.monotonic()
            yes = question()
            said.append(Said(begin, time.monotonic(), yes))

    threads = [
        threading.Thread(target=ask, args=item, name=item[0], daemon=True)
        for item in questions.items()
    ]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join(CALL_S)


def lose(scene: Scene, model: str, harm: Callable[[int], object]) -> dict[str, float]:
    """Have ``harm(pid)`` cost a model its worker; return how long each was wrong, in seconds.

    ``events`` is from the death until CRASHED came, or from the first request that was answered until READY came.
    """
    pid = scene.pid(model)
    since = scene.told()
    with asking(scene, model) as answers:
        wait_for("answers", lambda: all(said for said in answers.said.values()))
        pidfd = os.pidfd_open(pid)
        harmed = harm(pid)  # a call that nobody holds is cancelled
        # Not by select: whoever runs this may have more than 1,024 descriptors open.
        death = select.poll()
        death.register(pidfd, select.POLLIN)
        ended = death.poll(CALL_S * 1000)
        died = time.monotonic()
        os.close(pidfd)
        if not ended:
            raise TimeoutError("the worker lives")
        wait_for("READY", lambda: scene.watcher.of("READY", model, since))
        back = wait_for(
            "an answer",
            lambda: next((s for s in answers.said["requests"] if s.begin > died and s.yes), None),
        )
        counts = {who: len(said) for who, said in answers.said.items()}
        wait_for(
            "answers after it", lambda: all(len(answers.said[w]) > n for w, n in counts.items())
        )
    del harmed
    (crashed,) = scene.watcher.of("CRASHED", model, since)
    (ready,) = scene.watcher.of("READY", model, since)
    late = max(crashed.at - died, ready.at - back.end, 0.0)
    return {**answers.wrong_s(died), "events": late}
