"""serve, status, version, completion: the daemon itself."""

import os
import re
import sys

import click

from modelhost.cli.output import error_note, to_dict
from modelhost.cli.session import Command, Session, pass_session

NOT_INSTALLED = 1


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Run the daemon here, in the foreground. All that follows is modelhostd's: try serve --help."""
    missing = missing_parts()
    if missing:
        error_note(
            [
                f"modelhost: the daemon is not installed here: {', '.join(missing)} missing",
                "  next: pip install 'modelhost[server,torch]'",
            ]
        )
        sys.exit(NOT_INSTALLED)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "modelhostd", *arguments])  # noqa: S606


def missing_parts() -> list[str]:
    """Return what the daemon needs and this environment lacks, by distribution."""
    from importlib import metadata
    from importlib.util import find_spec

    if find_spec("modelhostd") is None:
        return ["modelhostd"]
    try:
        wanted = metadata.requires("modelhost") or []
    except metadata.PackageNotFoundError:
        return []  # Run from a checkout: modelhostd tells for itself.
    found = []
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name is None or not re.search(r"extra\s*==\s*['\"]server['\"]", requirement):
            continue
        try:
            metadata.version(name.group())
        except metadata.PackageNotFoundError:
            found.append(name.group())
    return found


@click.command(cls=Command)
@pass_session
def status(session: Session) -> None:
    """Show the daemon, its devices and what they do."""
    from modelhost import Unimplemented
    from modelhost.cli import views, views_memory

    output = session.output
    with session.client() as client:
        host, devices = client.host(), client.devices()
        try:
            statistics = client.statistics()
        except Unimplemented:
            statistics = None
        target = client.target
    if output.json:
        told = {"target": target, "host": to_dict(host), "devices": [to_dict(d) for d in devices]}
        output.document(told | ({"statistics": to_dict(statistics)} if statistics else {}))
        return
    output.pairs(views.host_pairs(host, target))
    if statistics is not None:
        output.pairs(views.statistics_pairs(statistics))
    output.blank()
    output.rows(devices, views_memory.DEVICE_COLUMNS)
    for warning in views.host_warnings(host):
        output.say(f"note: {warning}")


@click.command(cls=Command)
@pass_session
def version(session: Session) -> None:
    """Show the version of this command, and of the daemon if one answers."""
    from modelhost import Unreachable, __version__

    output = session.output
    daemon: dict[str, str] = {}
    with session.client() as client:
        target = client.target
        try:
            host = client.host()
            daemon = {"version": host.version, "target": target}
        except Unreachable as error:
            daemon = {"version": "", "target": target, "error": error.message}
    if output.json:
        output.document({"client": __version__, "daemon": daemon})
    else:
        output.pairs(
            [("client", __version__), ("daemon", daemon["version"] or daemon.get("error", ""))]
        )


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell, to be sourced: eval "$(modelhost completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = context.find_root().command
    click.echo(kind(root, {}, "modelhost", "_MODELHOST_COMPLETE").source())
