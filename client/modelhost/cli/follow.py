"""An operation on the command line: its progress, its end, and what Ctrl-C leaves behind."""

import sys
from typing import TYPE_CHECKING

import click

from modelhost.cli.failures import INTERRUPTED
from modelhost.cli.output import error_note, to_dict
from modelhost.cli.session import Session

if TYPE_CHECKING:
    from modelhost import OperationHandle
    from modelhost.v1.operations_pb2 import Operation


def follow(session: Session, handle: "OperationHandle", *, quiet: bool = False) -> "Operation":
    """Show an operation until it ends and return it. Raises what it failed with.

    With --json each state is a line. ``quiet`` shows no progress: for work that takes no time.
    """
    output = session.output
    try:
        if output.json:
            return handle.result(
                session.timeout, progress=lambda operation: output.json_line(to_dict(operation))
            )
        from modelhost._progress import shown

        if quiet or handle.done:
            return handle.result(session.timeout)
        with shown(sys.stderr) as report:
            return handle.result(session.timeout, progress=report)
    except KeyboardInterrupt:
        interrupted(session, handle)
        raise AssertionError("interrupted returned") from None


def interrupted(session: Session, *handles: "OperationHandle") -> None:
    """Say that the daemon goes on, and how to end it; exit like any command that Ctrl-C ends."""
    error_note([""])
    for handle in handles:
        identity = handle.name.partition("/")[2]
        again, end = f"`modelhost ops wait {identity}`", f"`modelhost cancel {identity}`"
        error_note(
            [
                f"modelhost: interrupted; the daemon goes on with {handle.name}",
                f"  next: {again} waits again, {end} ends it",
            ]
        )
        if session.output.json:
            session.output.json_line(
                {"interrupted": {"operation": handle.name, "exitCode": INTERRUPTED}}
            )
    click.get_current_context().exit(INTERRUPTED)


def ended(session: Session, operation: "Operation") -> None:
    """Say what an operation brought, for people."""
    from modelhost._names import short
    from modelhost._progress import title
    from modelhost.cli.views import outcome

    if not session.output.json:
        told = outcome(operation) or "done"
        session.output.say(f"{title(operation) or short(operation.name)}: {told}")
