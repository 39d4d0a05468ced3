"""Health checks, which run in turn with the requests of their instance."""

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Health
from modelhostd.core.values import dataclass
from modelhostd.worker import failures
from modelhostd.worker.channel import Channel
from modelhostd.worker.jobs import Activity, Hosted
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Kind

CHECK_PRIORITY = 2**31 - 1
"""Before every request: an instance that is sick must not look so for being busy."""


@dataclass
class CheckJob:
    """One health check, in turn with the requests of its instance."""

    channel: Channel
    request: int
    generation: int
    instance: str
    priority: int = CHECK_PRIORITY
    streaming: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """Instance and generation that it is for."""
        return self.instance, self.generation

    @property
    def ticket(self) -> int:
        """Its number in the queue: the two sockets count their requests apart, so below zero."""
        return -self.request

    def refuse(self, error: ModelhostError) -> None:
        """Answer without a check."""
        if error.reason is Reason.MODEL_NOT_LOADED:
            self._answer(Health.UNHEALTHY, "The worker does not hold this instance.")
        else:
            self._answer(Health.UNKNOWN, error.message)

    def run(self, hosted: Hosted, activity: Activity) -> BaseException | None:
        """Run the check and send what it found; return what the backend raised, if it did."""
        try:
            report = activity.compute(hosted.backend.health_check)
        except BaseException as error:
            failure = failures.from_infer(error, hosted.model, hosted.device)
            self._answer(Health.UNHEALTHY, f"The health check failed: {failure.message}")
            return error
        self._answer(Health.HEALTHY if report.ok else Health.UNHEALTHY, report.message)
        return None

    def _answer(self, health: Health, message: str) -> None:
        header = worker_pb2.CheckedHeader(
            health=health, message=message[: failures.MAX_TEXT_CHARACTERS]
        )
        self.channel.send(
            Kind.CHECKED, frames.FINAL, self.request, self.generation, header.SerializeToString()
        )
