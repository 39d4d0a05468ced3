"""What ModelStatistics tells of one model and version: counts and nanoseconds, never falling."""

from dataclasses import field

from modelhostd.core.values import dataclass
from modelhostd.ports import InferReply

BATCH_SIZES_MAX = 256
"""Batch sizes that are told apart; of further ones only the sums are kept."""


@dataclass(slots=True)
class BatchFigures:
    """Executions of one size. Each request of a batch adds its share of the items, so that they sum up to whole ones."""

    execution_count: float = 0.0
    input_ns: int = 0
    infer_ns: float = 0.0
    output_ns: int = 0


@dataclass(slots=True)
class Figures:
    """Counts and times of the requests to one model and version."""

    success_count: int = 0
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    load_ns: int = 0
    """Until the model was there for them: of all requests that got to a worker in the end."""
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    inference_count: int = 0
    execution_count: float = 0.0
    last_inference_ms: int = 0
    batches: dict[int, BatchFigures] = field(default_factory=dict)
    """By batch size."""

    def failed(self, passed_ns: int) -> None:
        """Count a request that failed."""
        self.fail_count += 1
        self.fail_ns += passed_ns

    def succeeded(self, reply: InferReply, passed_ns: int, now_ms: int) -> None:
        """Count a request that was answered. Times of a batch count for each of its requests, as in Triton."""
        size = reply.batch_size or 1
        share = reply.item_count / size
        self.success_count += 1
        self.success_ns += passed_ns
        self.queue_ns += reply.queue_ns
        self.input_ns += reply.input_ns
        self.infer_ns += reply.infer_ns
        self.output_ns += reply.output_ns
        self.inference_count += reply.item_count
        self.execution_count += share
        self.last_inference_ms = now_ms
        batch = self.batches.get(size)
        if batch is None:
            if len(self.batches) >= BATCH_SIZES_MAX:
                return
            batch = self.batches[size] = BatchFigures()
        batch.execution_count += share
        batch.input_ns += reply.input_ns
        batch.infer_ns += reply.infer_ns * share
        batch.output_ns += reply.output_ns
