"""Runs several requests as one, and answers each for itself.

A request that makes the others fail would take them along, so after a failure each runs alone: the bad one
fails, the others are answered, a little later.
"""

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeGuard

from modelhostd.core.values import dataclass
from modelhostd.worker import oip
from modelhostd.worker.backend import Cancelled, InferContext, Output, Tensor
from modelhostd.worker.batching import Candidate, choose
from modelhostd.worker.checks import CheckJob
from modelhostd.worker.fairqueue import Entry as Place
from modelhostd.worker.jobs import Activity, Hosted, InferJob
from modelhostd.worker.tensors import as_tensor
from modelhostd.worker.v1 import worker_pb2

log = logging.getLogger("modelhostd.worker")


LOOK = 256
"""Waiting requests that are looked at for one batch."""
PASS_SHARE = 8
"""A request of so small a part of another one's bytes runs between two of that one's batches."""


def joinable(job: object) -> TypeGuard[InferJob]:
    """Whether a job may run together with others: a request that wants one answer."""
    return isinstance(job, InferJob) and not job.streaming


def passes(job: object, long: InferJob) -> TypeGuard[InferJob | CheckJob]:
    """Whether a job need not wait for all of a ``long`` one: it is as urgent, and so much smaller."""
    if isinstance(job, CheckJob):
        return True
    return (
        joinable(job)
        and job.priority >= long.priority
        and len(job.payload) * PASS_SHARE <= len(long.payload)
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of requests that waited: run together, still waiting with their places, or refused."""

    together: list[InferJob]
    left: list[tuple[Place, InferJob]]
    refused: list[InferJob]


def form(waiting: Sequence[tuple[Place | None, InferJob]], hosted: Hosted) -> Batch:
    """Parse what waits and choose what runs now. The first has no place: it runs, unless it is refused."""
    ready = [(place, job) for place, job in waiting if job.prepare(hosted)]
    kept = {id(job) for _, job in ready}
    refused = [job for _, job in waiting if id(job) not in kept]
    if not ready:
        return Batch([], [], refused)
    chosen = set(choose([_candidate(job, hosted) for _, job in ready], hosted.batch_limit))
    return Batch(
        [job for index, (_, job) in enumerate(ready) if index in chosen],
        [(p, j) for index, (p, j) in enumerate(ready) if index not in chosen and p is not None],
        refused,
    )


def _candidate(job: InferJob, hosted: Hosted) -> Candidate:
    parsed = job.parsed
    kind: Hashable
    try:
        kind, length = hosted.backend.alike(parsed.inputs)
    except Exception:
        log.exception("backend %s cannot tell what a request is like", hosted.backend_name)
        kind, length = object(), 0
    # Types as well: 1, 1.0 and true are equal, and need not mean the same.
    parameters = frozenset((key, type(value), value) for key, value in parsed.parameters.items())
    return Candidate((kind, parameters), parsed.item_count, length)


def run(jobs: Sequence[InferJob], hosted: Hosted, activity: Activity) -> BaseException | None:
    """Serve requests that :func:`form` chose; return what the backend raised, where nothing survives that."""
    if len(jobs) < 2:
        return jobs[0].run(hosted, activity) if jobs else None
    started_ns = time.monotonic_ns()
    requests = [job.parsed for job in jobs]
    backend = hosted.backend
    wanted = [request.outputs for request in requests]
    context = InferContext(
        parameters=requests[0].parameters,
        outputs=frozenset().union(*wanted) if all(wanted) else frozenset(),
        cancelled=lambda: all(job.unwanted() for job in jobs),
        progress=activity.advance,
        let_pass=activity.give_way,
        compute=activity.compute,
    )
    answers = None
    try:
        joined = backend.join([request.inputs for request in requests])
        joined_ns = time.monotonic_ns()
        outputs = backend.infer(joined, context)
        inferred_ns = time.monotonic_ns()
        answers = split(outputs, [request.item_count for request in requests])
    except BaseException as error:
        if not isinstance(error, Cancelled):
            if hosted.is_poisoned(error):
                for job in jobs:
                    job.fail(hosted, error)
                return error
            log.debug("%d requests failed together; each runs alone", len(jobs), exc_info=True)
    if answers is None:
        # Not before: what they computed together is as long in memory as their error.
        return _run_alone(jobs, hosted, activity)
    size = sum(request.item_count for request in requests)
    finished = []
    for job, request, answer in zip(jobs, requests, answers, strict=True):
        begin_ns = time.monotonic_ns()
        try:
            response = oip.Response(request, hosted.version, answer)
        except Exception as error:
            job.fail(hosted, error)
            continue
        header = worker_pb2.ResponseHeader(
            item_count=request.item_count,
            batch_size=size,
            queue_ns=max(0, started_ns - job.arrived_ns - job.input_ns),
            input_ns=job.input_ns + (joined_ns - started_ns) // len(jobs),
            infer_ns=inferred_ns - joined_ns,
            output_ns=time.monotonic_ns() - begin_ns,
        )
        finished.append((job, header, response))
    # Before the answers are out: what kills the process after them is not this model's doing.
    activity.end()
    for job, header, response in finished:
        job.answer(hosted, header, response)
    return None


def split(outputs: Mapping[str, Output], counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """Return each request's part of outputs that hold the items of all.

    Raises ``ValueError`` where an output has not as many items as were asked: a backend's bug.
    """
    parts: list[dict[str, Tensor]] = [{} for _ in counts]
    total = sum(counts)
    for name, output in outputs.items():
        tensor = as_tensor(output)
        if not tensor.array.ndim or len(tensor.array) != total:
            raise ValueError(f"output '{name}' {tensor.array.shape} is not one of {total} items")
        start = 0
        for part, count in zip(parts, counts, strict=True):
            part[name] = Tensor(tensor.datatype, tensor.array[start : start + count])
            start += count
    return parts


def _run_alone(
    jobs: Sequence[InferJob], hosted: Hosted, activity: Activity
) -> BaseException | None:
    for job in jobs:
        activity.begin(hosted.model)
        error = job.run(hosted, activity)
        if error is not None and hosted.is_poisoned(error):
            # The daemon answers the others: this process is about to end.
            return error
    return None
