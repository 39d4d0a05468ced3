"""What became of the last question to each kind of source: what GetHost says of them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Progress
from modelhostd.core.values import dataclass

T = TypeVar("T")

_UNREACHED = {
    Reason.NETWORK_ERROR.value: "UNREACHABLE",
    Reason.OFFLINE.value: "OFFLINE",
}

_NOT_ASKED = frozenset({Reason.SOURCE_NOT_ALLOWED, Reason.UNIMPLEMENTED, Reason.INVALID_ARGUMENT})
"""Refusals of our own: the question was never put."""


@dataclass(frozen=True, slots=True)
class Contact:
    """What became of the last question to a source: UNKNOWN, REACHABLE, UNREACHABLE or OFFLINE."""

    state: str = "UNKNOWN"
    message: str = ""
    time: float = 0.0


class Contacts:
    """The last contact with the sources of each scheme."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._last: dict[str, Contact] = {}

    def get(self, scheme: str) -> Contact:
        """Return what became of the last question."""
        return self._last.get(scheme, Contact())

    def reached(self, scheme: str) -> None:
        """Note that a source answered."""
        self._last[scheme] = Contact("REACHABLE", "", self._now())

    async def asking(self, scheme: str, question: Awaitable[T]) -> T:
        """Return the answer to a question, and note whether there was one."""
        before = self.get(scheme)
        try:
            answer = await question
        except ModelhostError as error:
            if error.reason in _NOT_ASKED:
                raise
            # Any other refusal is an answer, too.
            state = _UNREACHED.get(error.reason.value, "REACHABLE")
            message = error.message if state != "REACHABLE" else ""
            self._last[scheme] = Contact(state, message, self._now())
            raise
        except asyncio.CancelledError:
            self._last[scheme] = before
            raise
        self.reached(scheme)
        return answer

    def progressed(self, scheme: str, progress: Progress) -> None:
        """Note what a download finds out about its source while it runs."""
        before, retry = self.get(scheme), progress.retry
        if retry is not None and (state := _UNREACHED.get(retry.reason)) is not None:
            if before.message != retry.message:
                self._last[scheme] = Contact(state, retry.message, self._now())
        elif progress.bytes_per_second > 0 and before.state in _UNREACHED.values():
            self.reached(scheme)
