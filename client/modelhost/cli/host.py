"""budget, rate, export, import: the host."""

import sys

import click

from modelhost._text import show_bytes
from modelhost.cli.output import counted, to_dict
from modelhost.cli.registry import to_bytes
from modelhost.cli.session import Command, Session, pass_session


@click.command(cls=Command)
@click.argument("device", required=False)
@click.argument("size", required=False)
@pass_session
def budget(session: Session, device: str | None, size: str | None) -> None:
    """Show what modelhost may use of each device and of host memory, or set it (operators).

    DEVICE may be "host": the memory where weights stay when they leave a GPU. SIZE is bytes, 8GiB, 500MB,
    or default. A budget below what is loaded evicts idle models; one below what pins and leases hold is refused.
    """
    from modelhost.cli import views_memory as views

    wanted = None if size in (None, "default") else to_bytes(str(size), "SIZE")
    if wanted == 0 and device != views.HOST:
        raise click.BadParameter("at least 1 byte, or default", param_hint="SIZE")
    with session.client() as client:
        if device == views.HOST:
            if size is not None:
                client.update_settings({"host_budget_bytes": wanted})
            devices = []
        elif device is None:
            devices = client.devices()
        elif size is None:
            devices = [client.device(device)]
        else:
            devices = [client.set_budget(device, wanted)]
        tier = client.host_tier() if device in (None, views.HOST) else None
    if session.output.json:
        host = [{"name": views.HOST, **to_dict(tier)}] if tier is not None else []
        session.output.document([*(to_dict(found) for found in devices), *host])
    else:
        rows = [*devices, views.tier_row(tier)] if tier is not None else devices
        session.output.rows(rows, views.DEVICE_COLUMNS)


@click.command(cls=Command)
@click.argument("size", required=False)
@pass_session
def rate(session: Session, size: str | None) -> None:
    """Show or set the most bytes a second of all downloads together (operators).

    SIZE is bytes, 5MB, or 0 for no limit. Of one download: ops update --rate.
    """
    field = "download_rate_limit_bytes_per_second"
    with session.client() as client:
        if size is None:
            settings = client.settings()
        else:
            settings = client.update_settings({field: to_bytes(size, "SIZE")})
    limit = settings.download_rate_limit_bytes_per_second
    if session.output.json:
        session.output.document({field: limit})
    else:
        session.output.pairs([("all downloads", f"{show_bytes(limit)}/s" if limit else "no limit")])


@click.command(cls=Command)
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
@pass_session
def export(session: Session, file: str) -> None:
    """Write the registry as one JSON document to FILE: models, slots, settings; no files."""
    with session.client() as client:
        document = client.export_registry()
    if file == "-":
        sys.stdout.buffer.write(document)
        sys.stdout.buffer.flush()
    else:
        with open(file, "wb") as opened:
            opened.write(document)


@click.command("import", cls=Command)
@click.argument("file", type=click.File("rb"))
@click.option(
    "--conflict",
    type=click.Choice(["fail", "skip", "update"]),
    default="fail",
    show_default=True,
    help="What happens to an id that is taken.",
)
@click.option("--settings", is_flag=True, help="Import settings and budgets, too.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@pass_session
def import_(
    session: Session, file: click.File, conflict: str, settings: bool, dry_run: bool
) -> None:
    """Register the models of a document that export made (operators). All of them, or none."""
    document = file.read()  # type: ignore[attr-defined]
    with session.client() as client:
        done = client.import_registry(
            document, conflict=conflict, include_settings=settings, dry_run=dry_run
        )
    if session.output.json:
        session.output.document(to_dict(done))
        return
    would = "would be " if dry_run else ""
    for names, what in (
        (done.created_models, f"{would}created"),
        (done.updated_models, f"{would}updated"),
        (done.skipped_models, "left as it is"),
        (done.slots, f"{would}switched"),
    ):
        for name in names:
            session.output.line([name, what])
    total = len(done.created_models) + len(done.updated_models)
    session.output.say(f"{counted(total, 'model')} {would}imported")
