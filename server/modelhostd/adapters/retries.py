"""Trying again: how long, how often, and what is said of it meanwhile."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.wire import Transient
from modelhostd.core.errors import Reason
from modelhostd.core.resources import Retry
from modelhostd.core.transfer import RetryPolicy

log = structlog.get_logger(__name__)

T = TypeVar("T")

Tell = Callable[[Retry | None], None]
"""Takes what is waited for; None = it goes on."""


class Patience:
    """The failures in a row of one piece of work (a plan, a file). For one thread at a time."""

    def __init__(
        self, policy: RetryPolicy, canceller: Canceller, tell: Tell, *, offline_waits: bool = True
    ) -> None:
        self._policy = policy
        self._canceller = canceller
        self._tell = tell
        self._offline_waits = offline_waits
        self._attempt = 0
        self._offline = 0
        self._told = False

    def failed(self, failure: Transient, *, gained: bool = False) -> None:
        """Wait until the next try, or raise the failure's error when there is none.

        ``gained``: the attempt brought enough for the count to begin anew. Without any network it is
        waited for as long as it takes, and no attempt is spent. Raises Stopped when cancelled.
        """
        error = failure.error
        jitter = random.random()  # noqa: S311 -- spreads clients, guards nothing
        if error.reason is Reason.OFFLINE and self._offline_waits:
            self._offline += 1
            delay: float | None = self._policy.offline_delay(self._offline, jitter)
        else:
            self._offline = 0
            self._attempt = 1 if gained else self._attempt + 1
            delay = self._policy.delay(self._attempt, failure.retry_after_s, jitter)
        if delay is None:
            raise error from failure
        if self._offline <= 1:
            log.info("tried again", attempt=self._attempt, in_s=round(delay, 2), why=error.message)
        message = error.message
        if self._offline:
            # Said of a source that was asked in vain; this work waits, and nobody needs to ask again.
            message = f"{message.partition(';')[0]}; it goes on by itself when the network is back"
        told = Retry(self._attempt, error.reason.value, message, time.time() + delay)
        self._told = True
        self._tell(told)
        self._canceller.wait(delay)

    def goes_on(self) -> None:
        """Say that it works again, if something else was said."""
        if self._told:
            self._told = False
            self._tell(None)


def with_retries(work: Callable[[], T], patience: Patience) -> T:
    """Do ``work`` again after each Transient, as patience says; raise its error in the end."""
    while True:
        try:
            result = work()
        except Transient as failure:
            patience.failed(failure)
        else:
            patience.goes_on()
            return result
