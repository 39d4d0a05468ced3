"""storage, verify, prune, quarantine: what is on disk."""

from typing import TYPE_CHECKING

import click

from modelhost.cli.failures import FAILURE
from modelhost.cli.follow import ended, follow
from modelhost.cli.output import error_note, to_dict
from modelhost.cli.session import Command, Group, Session, model_argument, pass_session

if TYPE_CHECKING:
    from modelhost.v1.operations_pb2 import Operation

entry = click.argument("file", metavar="FILE")


@click.command(cls=Command)
@click.option("--check", is_flag=True, help="Compare registry and disk (operators).")
@click.option("--deep", is_flag=True, help="With --check: hash every file, too.")
@click.option("--repair", is_flag=True, help="With --check: mend what can be mended without loss.")
@click.pass_context
def storage(context: click.Context, check: bool, deep: bool, repair: bool) -> None:
    """Show what the disk is used for, or check it. Exit code 1 where something is wrong."""
    from modelhost.cli import storage_views as views

    session = context.ensure_object(Session)
    if (deep or repair) and not check:
        raise click.UsageError("--deep and --repair belong to --check")
    with session.client() as client:
        if check:
            handle = client.check_storage(deep=deep, repair=repair, wait=False)
            done = follow(session, handle)
            ended(session, done)
            _exit_on_findings(context, session, done)
            return
        used = client.storage()
    if session.output.json:
        session.output.document(to_dict(used))
        return
    session.output.pairs(views.storage_pairs(used))
    session.output.rows(used.models, views.USE_COLUMNS)


@click.command(cls=Command)
@model_argument
@click.option("--version", default=0, metavar="N", help="Which files. Default: the newest.")
@click.pass_context
def verify(context: click.Context, model: str, version: int) -> None:
    """Hash a model's files again. Exit code 1 where one is not what it was.

    A model with such a file is QUARANTINED then; `modelhost pull` fetches it again.
    """
    session = context.ensure_object(Session)
    with session.client() as client:
        done = follow(session, client.verify(model, version=version, wait=False))
        ended(session, done)
    _exit_on_findings(context, session, done)


@click.command(cls=Command)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@pass_session
def prune(session: Session, dry_run: bool) -> None:
    """Remove files that no model needs and what abandoned downloads left (operators)."""
    with session.client() as client:
        handle = client.prune_storage(dry_run=dry_run, wait=False)
        ended(session, follow(session, handle, quiet=True))


@click.group(cls=Group)
def quarantine() -> None:
    """Look at files that were not what their source promised; release or delete them (operators)."""


@quarantine.command("ls")
@click.option("--model", metavar="MODEL", help="Only this model's.")
@pass_session
def list_files(session: Session, model: str | None) -> None:
    """List files in quarantine, newest first."""
    from modelhost.cli import storage_views as views

    with session.client() as client:
        found = client.quarantine(model)
    if session.output.json:
        session.output.document([to_dict(file) for file in found])
        return
    session.output.rows(found, views.QUARANTINE_COLUMNS)
    if not found and session.output.table:
        error_note(["nothing is in quarantine"])


@quarantine.command("restore")
@entry
@pass_session
def restore(session: Session, file: str) -> None:
    """Declare a file right: its model's next download takes it as it is."""
    with session.client() as client:
        model = client.restore_quarantined(file)
    if session.output.json:
        session.output.document(to_dict(model))
    else:
        session.output.say(f"the next download of {model.name} takes it")


@quarantine.command("rm")
@entry
@pass_session
def remove(session: Session, file: str) -> None:
    """Delete a file for good."""
    with session.client() as client:
        client.delete_quarantined(file)
    session.output.say(f"{file} is deleted")


def _exit_on_findings(context: click.Context, session: Session, done: "Operation") -> None:
    result = done.verify_result if done.HasField("verify_result") else done.check_storage_result
    if not session.output.json:
        for finding in result.findings:
            session.output.line([finding.kind, finding.message])
    if any(not finding.repaired for finding in result.findings):
        context.exit(FAILURE)
