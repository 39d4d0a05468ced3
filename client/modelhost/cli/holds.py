"""lease, slots, switch: holding a model while a command runs, and names whose model can be switched."""

import subprocess

import click

from modelhost.cli.follow import ended, follow
from modelhost.cli.output import error_note, to_dict
from modelhost.cli.session import Command, Session, complete_models, model_argument, pass_session

LEASE_S = 60.0


@click.command(cls=Command, context_settings={"ignore_unknown_options": True})
@model_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
@click.pass_context
def lease(context: click.Context, model: str, command: tuple[str, ...]) -> None:
    """Run a command, and keep a model from eviction meanwhile. The exit code is the command's."""
    session = context.ensure_object(Session)
    with session.client() as client, client.lease(model, LEASE_S) as held:
        try:
            process = subprocess.Popen(command)
        except FileNotFoundError:
            raise click.UsageError(f"no such command: {command[0]}") from None
        try:
            while True:
                try:
                    code = process.wait(LEASE_S / 3)
                    break
                except subprocess.TimeoutExpired:
                    held.renew(LEASE_S)
        finally:
            if process.poll() is None:
                process.terminate()
    context.exit(code if code >= 0 else 128 - code)


@click.command(cls=Command)
@click.option("--model", metavar="MODEL", help="Only those that stand for this model.")
@pass_session
def slots(session: Session, model: str | None) -> None:
    """List slots: names that stand for a model."""
    from modelhost.cli import views

    with session.client() as client:
        found = client.slots(model)
    if session.output.json:
        session.output.document([to_dict(slot) for slot in found])
        return
    session.output.rows(found, views.SLOT_COLUMNS)
    if not found and session.output.table:
        error_note(["there are no slots; `modelhost switch SLOT MODEL` makes one"])


@click.command(cls=Command)
@click.argument("slot", metavar="SLOT")
@click.argument("model", required=False, metavar="MODEL", shell_complete=complete_models)
@click.option("--clear", is_flag=True, help="Remove the slot; its model stays as it is.")
@click.option("--unload-previous", is_flag=True, help="Unload the old model after the switch.")
@click.option("--etag", default="", metavar="ETAG", help="Only if the slot still has this etag.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait; print the operation.")
@pass_session
def switch(
    session: Session,
    slot: str,
    model: str | None,
    clear: bool,
    unload_previous: bool,
    etag: str,
    detach: bool,
) -> None:
    """Load a model and make a slot stand for it. No request to the slot is refused meanwhile."""
    if clear == bool(model):
        raise click.UsageError("name the model that the slot is to stand for, or say --clear")
    if clear and (unload_previous or detach):
        raise click.UsageError("--unload-previous and --detach are of a switch, not of --clear")
    with session.client() as client:
        if not model:
            client.clear_slot(slot, etag=etag)
            session.output.say(f"{slot} is cleared")
            return
        handle = client.switch(slot, model, etag=etag, unload_previous=unload_previous, wait=False)
        if detach:
            from modelhost._names import short

            if session.output.json:
                session.output.json_line(to_dict(handle.operation))
            else:
                session.output.line([short(handle.name), short(handle.model)])
            return
        ended(session, follow(session, handle))
