"""Several operations on the command line: side by side, with one summary and one exit code."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from modelhost.cli.failures import FAILURE, as_object, exit_code
from modelhost.cli.follow import interrupted
from modelhost.cli.output import Column, counted, error_note, to_dict
from modelhost.cli.session import Session

if TYPE_CHECKING:
    from modelhost import Client, OperationHandle, Outcome


def detached(session: Session, handle: "OperationHandle") -> None:
    """Print an operation that nobody waits for."""
    from modelhost._names import short

    if session.output.json:
        session.output.json_line(to_dict(handle.operation))
    else:
        session.output.line([short(handle.name), short(handle.model)])


class Batch:
    """Operations that are begun one after the other and end side by side."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._begun: list[tuple[str, OperationHandle | None]] = []
        self._outcomes: list[Outcome] = []

    def begin(self, asked: str, start: "Callable[[], OperationHandle]") -> None:
        """Begin one; where that fails, the failure is its result."""
        from modelhost import ModelhostError
        from modelhost._batch import Outcome

        try:
            handle = start()
        except ModelhostError as error:
            self._begun.append((asked, None))
            self._outcomes.append(Outcome(asked, None, error))
        else:
            self._begun.append((asked, handle))

    def end(self, client: "Client", *, detach: bool) -> None:
        """Wait for all, sum up, and exit with an error where one failed."""
        from modelhost._batch import Outcome

        handles = [handle for _, handle in self._begun if handle is not None]
        if detach:
            for handle in handles:
                detached(self._session, handle)
        else:
            waited = iter(self._followed(client, handles))
            failed = iter(self._outcomes)
            self._outcomes = [
                Outcome(asked, (found := next(waited)).operation, found.error)
                if handle is not None
                else next(failed)
                for asked, handle in self._begun
            ]
            self._sum_up()
        self._report()

    def _followed(self, client: "Client", handles: "list[OperationHandle]") -> "list[Outcome]":
        output, timeout = self._session.output, self._session.timeout
        try:
            if output.json:
                return client.wait_all(
                    handles,
                    progress=lambda operation: output.json_line(to_dict(operation)),
                    timeout=timeout,
                )
            from modelhost._progress import shown

            with shown(sys.stderr) as report:
                return client.wait_all(handles, progress=report, timeout=timeout)
        except KeyboardInterrupt:
            interrupted(self._session, *handles)
            raise AssertionError("interrupted returned") from None

    def _sum_up(self) -> None:
        """Write one line for each, in the order in which they were asked for."""
        output = self._session.output
        if output.json:
            output.json_line({"summary": [_as_object(outcome) for outcome in self._outcomes]})
            return
        output.rows(self._outcomes, _COLUMNS)
        well = sum(outcome.ok for outcome in self._outcomes)
        if output.table:
            output.say(f"{well} of {counted(len(self._outcomes), 'pull')} ended well")

    def _report(self) -> None:
        """Say on stderr what failed and what to do about it, and exit."""
        codes = set()
        for outcome in self._outcomes:
            if (error := outcome.error) is not None:
                codes.add(exit_code(error))
                reason = f" [{error.reason}]" if error.reason else ""
                # Most messages begin with what was asked for.
                named = error.message.startswith(outcome.asked)
                told = error.message if named else f"{outcome.asked}: {error.message}"
                error_note([f"modelhost: {told}{reason}"])
                if error.hint:
                    error_note([f"  next: {error.hint}"])
        if codes:
            click.get_current_context().exit(codes.pop() if len(codes) == 1 else FAILURE)


def _model(outcome: "Outcome") -> str:
    from modelhost._names import short

    return short(outcome.operation.model) if outcome.operation is not None else ""


def _told(outcome: "Outcome") -> str:
    from modelhost.cli.views import outcome as brought

    if outcome.error is not None:
        return outcome.error.reason or outcome.error.code.name
    assert outcome.operation is not None
    return brought(outcome.operation) or "done"


def _as_object(outcome: "Outcome") -> dict[str, object]:
    error, operation = outcome.error, outcome.operation
    return {
        "asked": outcome.asked,
        "ok": outcome.ok,
        "operation": to_dict(operation) if operation is not None else None,
        "error": as_object(error, exit_code(error)) if error is not None else None,
    }


_COLUMNS: "list[Column[Outcome]]" = [
    Column("SOURCE", lambda outcome: outcome.asked),
    Column("MODEL", _model),
    Column("ENDED", lambda outcome: "well" if outcome.ok else "failed"),
    Column("WHAT", _told, prose=True),
]
