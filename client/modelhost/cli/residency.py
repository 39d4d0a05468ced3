"""load, reload, unload, ps, pin, unpin, plan: what is in memory."""

import click

from modelhost.cli.failures import exit_code
from modelhost.cli.follow import ended, follow
from modelhost.cli.output import error_note, to_dict
from modelhost.cli.session import Command, Session, complete_models, model_argument, pass_session


@click.command(cls=Command)
@model_argument
@click.option("--device", metavar="DEVICE", help="Where to. Default: as the model's config says.")
@click.option(
    "--priority", default=0, type=click.IntRange(-100, 100), help="The higher, the earlier."
)
@click.option("--download", is_flag=True, help="Download its files first where they are absent.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait; print the operation.")
@pass_session
def load(
    session: Session, model: str, device: str | None, priority: int, download: bool, detach: bool
) -> None:
    """Load a model onto a device. Ctrl-C leaves the load running."""
    from modelhost._names import short

    with session.client() as client:
        handle = client.load(model, device=device, priority=priority, download=download, wait=False)
        if detach:
            if session.output.json:
                session.output.json_line(to_dict(handle.operation))
            else:
                session.output.line([short(handle.name), short(handle.model)])
            return
        ended(session, follow(session, handle))


@click.command(cls=Command)
@model_argument
@click.option(
    *("--version", "version"),
    default=0,
    metavar="N",
    type=click.IntRange(min=0),
    help="Which files. Default: the newest.",
)
@pass_session
def reload(session: Session, model: str, version: int) -> None:
    """Replace what is loaded by a model's newest files, or go back to a version that is kept.

    `modelhost pull --refresh MODEL` brings newer files; `modelhost show MODEL` lists the versions.
    """
    with session.client() as client:
        ended(session, follow(session, client.reload(model, version=version, wait=False)))


@click.command(cls=Command)
@click.argument("models", nargs=-1, metavar="MODEL...", shell_complete=complete_models)
@click.option("--all", "every", is_flag=True, help="Unload every model.")
@click.option(
    "--keep-warm", is_flag=True, help="Leave the weights in host memory, as far as there is room."
)
@click.option("-f", "--force", is_flag=True, help="Cancel what is in flight.")
@pass_session
def unload(
    session: Session, models: tuple[str, ...], every: bool, keep_warm: bool, force: bool
) -> None:
    """Unload models once what is in flight has ended; then their memory is free, the host's, too.

    With --keep-warm the weights stay in host memory, from where the next load is quick.
    """
    if every == bool(models):
        raise click.UsageError("name the models to unload, or say --all")
    with session.client() as client:
        named = [instance.model for instance in client.instances()] if every else models
        for model in dict.fromkeys(named):
            handle = client.unload(model, keep_warm=keep_warm, force=force, wait=False)
            ended(session, follow(session, handle, quiet=True))


@click.command(cls=Command)
@click.option("--device", metavar="DEVICE", help="Only what is on this device.")
@pass_session
def ps(session: Session, device: str | None) -> None:
    """List what is loaded, warm or loading: bytes predicted and real, and who would be evicted in which order."""
    from modelhost.cli import views_memory as views

    with session.client() as client:
        instances = client.instances(device=device)
    if session.output.json:
        session.output.document([to_dict(instance) for instance in instances])
        return
    session.output.rows(instances, views.INSTANCE_COLUMNS)
    if not instances and session.output.table:
        error_note(["nothing is loaded; `modelhost load MODEL` loads one"])


@click.command(cls=Command)
@model_argument
@pass_session
def pin(session: Session, model: str) -> None:
    """Forbid a model's eviction, without end (operators). It is not loaded by that."""
    with session.client() as client:
        pinned = client.pin(model)
    if session.output.json:
        session.output.document(to_dict(pinned))
    else:
        session.output.say(f"{pinned.name} is pinned")


@click.command(cls=Command)
@model_argument
@pass_session
def unpin(session: Session, model: str) -> None:
    """Allow a model's eviction again (operators)."""
    with session.client() as client:
        unpinned = client.unpin(model)
    if session.output.json:
        session.output.document(to_dict(unpinned))
    else:
        session.output.say(f"{unpinned.name} is no longer pinned")


@click.command(cls=Command)
@model_argument
@click.option("--device", metavar="DEVICE", help="Where to. Default: as the model's config says.")
@click.pass_context
def plan(context: click.Context, model: str, device: str | None) -> None:
    """Say what a load would do, and do nothing. Exit code as load's where it would be refused."""
    from modelhost._status import error_from_message
    from modelhost.cli.views_memory import plan_pairs

    session = context.ensure_object(Session)
    with session.client() as client:
        planned = client.plan(model, device)
    if session.output.json:
        session.output.document(to_dict(planned))
    else:
        session.output.pairs(plan_pairs(planned))
    if planned.HasField("refusal"):
        context.exit(exit_code(error_from_message(planned.refusal)))
