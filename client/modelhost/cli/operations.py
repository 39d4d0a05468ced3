"""ops, pause, resume, cancel: long work, by its id or by the model that it is on."""

import re
from typing import TYPE_CHECKING

import click

from modelhost.cli.follow import ended, follow
from modelhost.cli.output import error_note, to_dict
from modelhost.cli.registry import to_bytes
from modelhost.cli.session import Command, Group, Session, pass_session

if TYPE_CHECKING:
    from modelhost import Client
    from modelhost.v1.operations_pb2 import Operation

_ID = re.compile(r"(operations/)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NOT_ENDED = ("QUEUED", "RUNNING", "PAUSED")

identity = click.argument("operation", metavar="OPERATION|MODEL")


@click.group(cls=Group)
def ops() -> None:
    """Look at long work and steer it: downloads, loads, checks."""


@ops.command("ls")
@click.option("--model", metavar="MODEL", help="Only those on this model.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only those of this kind.")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only those in this state.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="At most so many.",
)
@pass_session
def ls(
    session: Session, model: str | None, kinds: tuple[str, ...], states: tuple[str, ...], limit: int
) -> None:
    """List operations, newest first."""
    from modelhost.cli import views

    with session.client() as client:
        found = client.operations(model, kinds=kinds, states=states, limit=limit)
    if session.output.json:
        session.output.document([to_dict(operation) for operation in found])
        return
    session.output.rows(found, views.OPERATION_COLUMNS)
    if not found and session.output.table:
        error_note(["no operations"])


@ops.command("show")
@identity
@pass_session
def show(session: Session, operation: str) -> None:
    """Show one operation as it is now."""
    from modelhost.cli import views

    with session.client() as client:
        found = client.operation(_meant(client, operation)).operation
    if session.output.json:
        session.output.document(to_dict(found))
    else:
        session.output.pairs(views.operation_pairs(found))


@ops.command("wait")
@identity
@pass_session
def wait(session: Session, operation: str) -> None:
    """Follow an operation to its end; exit code as its result."""
    with session.client() as client:
        ended(session, follow(session, client.operation(_meant(client, operation))))


@ops.command("update")
@identity
@click.option("--priority", type=click.IntRange(-100, 100), help="The higher, the earlier.")
@click.option(
    "--rate", metavar="SIZE", help="The most bytes a second (5MB) of a download; 0 = no limit."
)
@pass_session
def update(session: Session, operation: str, priority: int | None, rate: str | None) -> None:
    """Change what work that waits or runs was begun with."""
    if priority is None and rate is None:
        raise click.UsageError("what is to change? --priority or --rate")
    limit = to_bytes(rate, "--rate") if rate is not None else None
    with session.client() as client:
        after = client.update_operation(
            _meant(client, operation), priority=priority, rate_limit_bytes_per_second=limit
        )
    _told(session, after)


@ops.command("pause")
@identity
@pass_session
def pause_(session: Session, operation: str) -> None:
    """Stop a download and keep what it has."""
    _steer(session, operation, "pause")


@ops.command("resume")
@identity
@pass_session
def resume_(session: Session, operation: str) -> None:
    """Let a paused download go on."""
    _steer(session, operation, "resume")


@ops.command("cancel")
@identity
@pass_session
def cancel_(session: Session, operation: str) -> None:
    """Ask for an operation's end, for everyone who waits for it."""
    _steer(session, operation, "cancel")


@click.command(cls=Command)
@identity
@pass_session
def pause(session: Session, operation: str) -> None:
    """Stop a download and keep what it has: the same as ops pause."""
    _steer(session, operation, "pause")


@click.command(cls=Command)
@identity
@pass_session
def resume(session: Session, operation: str) -> None:
    """Let a paused download go on: the same as ops resume."""
    _steer(session, operation, "resume")


@click.command(cls=Command)
@identity
@pass_session
def cancel(session: Session, operation: str) -> None:
    """Ask for an operation's end: the same as ops cancel."""
    _steer(session, operation, "cancel")


def _steer(session: Session, operation: str, verb: str) -> None:
    with session.client() as client:
        handle = client.operation(_meant(client, operation))
        after = {"pause": handle.pause, "resume": handle.resume, "cancel": handle.cancel}[verb]()
        _told(session, after, asked=after.cancel_requested and not handle.done)


def _meant(client: "Client", given: str) -> str:
    """Return the operation that is meant: the given one, or the one that is under way on a model.

    Raises UsageError where several are.
    """
    if _ID.fullmatch(given):
        return given
    found = client.operations(given, states=_NOT_ENDED)
    if len(found) > 1:
        names = ", ".join(operation.name.rpartition("/")[2] for operation in found)
        raise click.UsageError(f"several operations are under way on {given}: {names}")
    return found[0].name if found else given


def _told(session: Session, after: "Operation", *, asked: bool = False) -> None:
    from modelhost._enums import name_of
    from modelhost._progress import title
    from modelhost.v1.operations_pb2 import Operation

    if session.output.json:
        session.output.document(to_dict(after))
        return
    state = name_of(Operation.State, after.state).lower()
    session.output.say(f"{title(after)}: {state}{', cancel requested' if asked else ''}")
