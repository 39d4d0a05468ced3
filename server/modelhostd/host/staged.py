"""What one commit is made of, and what is left of it when it fails."""

import asyncio
from collections.abc import Callable, Sequence

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Event, Kind
from modelhostd.core.state import Edit, State
from modelhostd.core.values import dataclass
from modelhostd.ports import RequestRecord

RETRY_S = 1.0


@dataclass(slots=True, eq=False)
class Staged:
    """Edits that were decided together. ``happened``: they stand, whatever becomes of their commit.

    One of ``stored`` and ``undone`` is called in the end; of what happened, neither may be set.
    """

    edits: Sequence[Edit]
    principal: str
    time: float
    done: asyncio.Future[int]
    happened: bool = False
    request: RequestRecord | None = None
    stored: Callable[[], None] | None = None
    undone: Callable[[], None] | None = None

    def fail(self, error: ModelhostError) -> None:
        """Tell who waits that it was not stored."""
        if not self.done.done():
            self.done.set_exception(error)


def future() -> "asyncio.Future[int]":
    """Return a future that nobody has to wait for."""
    made: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    made.add_done_callback(retrieve)
    return made


def shielded(inner: "asyncio.Future[int]") -> "asyncio.Future[int]":
    """Return a future for one caller: if that is cancelled, those who wait behind it are not."""
    outer = asyncio.shield(inner)
    outer.add_done_callback(retrieve)
    return outer


def retrieve(future: "asyncio.Future[int]") -> None:
    """Look at a future's failure, so that a caller who does not wait makes no noise."""
    if not future.cancelled():
        future.exception()


def events_of(taken: Sequence[Staged], committed: State, last_sequence: int) -> Sequence[Event]:
    """Return the events of a batch, numbered from ``last_sequence + 1``."""
    events: list[Event] = []
    exists: dict[tuple[Kind, str], bool] = {}
    for staged in taken:
        for edit in staged.edits:
            key = (edit.kind, edit.key)
            known = exists.get(key, committed.get(*key) is not None)
            exists[key] = edit.resource is not None
            events.append(
                Event(
                    sequence=last_sequence + len(events) + 1,
                    time=staged.time,
                    kind=edit.kind,
                    key=edit.key,
                    resource=edit.resource,
                    reason=edit.reason,
                    details=edit.details,
                    principal=staged.principal,
                    created=not known and edit.resource is not None,
                )
            )
    return events


def undo(everything: Sequence[Staged], decided: State, committed: State) -> list[Staged]:
    """Undo what was decided; what happened is applied again, and returned for the next commit.

    Of several edits of one resource the last is carried over; one that came and went meanwhile has
    never been seen by anybody, and is not mentioned.
    """
    for staged in everything:
        for edit in () if staged.happened else staged.edits:
            decided.put(edit.kind, edit.key, committed.get(edit.kind, edit.key))
    carried: dict[tuple[Kind, str], Staged] = {}
    for staged in everything:
        for edit in staged.edits if staged.happened else ():
            decided.apply(edit)
            key = (edit.kind, edit.key)
            carried.pop(key, None)
            if edit.resource is not None or committed.get(*key) is not None:
                carried[key] = Staged((edit,), staged.principal, staged.time, future(), True)
    return list(carried.values())


def refused() -> ModelhostError:
    """Return the error of a change that is not taken at all."""
    return ModelhostError(
        Reason.STORAGE_ERROR,
        "the registry takes no changes now (shutting down, or the disk does not answer); "
        "try again later",
        {"path": "modelhost.db", "cause": "queue"},
        retry_delay_s=5.0,
    )


def undone() -> ModelhostError:
    """Return the error of a change that was decided after one that could not be stored."""
    return ModelhostError(
        Reason.STORAGE_ERROR,
        "the change could not be stored, because one before it failed; nothing of it was kept: "
        "try again",
        {"path": "modelhost.db", "cause": "earlier commit failed"},
        retry_delay_s=RETRY_S,
    )


def unexpected(error: Exception) -> ModelhostError:
    """Return the error of a commit that failed as none should."""
    return ModelhostError(
        Reason.STORAGE_ERROR,
        "the change could not be stored; the daemon's log has the cause",
        {"path": "modelhost.db", "cause": type(error).__name__},
        retry_delay_s=RETRY_S,
    )
