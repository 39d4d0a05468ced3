"""The command itself: its commands in sections, the global options, and what an error becomes."""

import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from modelhost._errors import ModelhostError
from modelhost.cli import (
    daemon,
    failures,
    files,
    holds,
    host,
    infer,
    observe,
    operations,
    pull,
    registry,
    residency,
    run,
    sources,
    storage,
    top,
)
from modelhost.cli.output import error_note
from modelhost.cli.session import Group, Session, global_options

SECTIONS: Mapping[str, Sequence[click.Command]] = {
    "Daemon": (
        *(daemon.serve, daemon.status, sources.sources),
        *(daemon.version, daemon.completion),
    ),
    "Models": (
        *(pull.pull, registry.add, registry.ls, registry.show, registry.rm),
        *(registry.inspect, registry.check, files.upload, files.outdated, host.rate),
    ),
    "Disk": (storage.storage, storage.verify, storage.prune, storage.quarantine),
    "Memory": (
        *(residency.load, residency.reload, residency.unload, residency.ps, top.top),
        *(residency.pin, residency.unpin, residency.plan, host.budget),
        *(holds.lease, holds.slots, holds.switch),
    ),
    "Use": (run.run, infer.infer),
    "Work and events": (
        *(operations.ops, operations.pause, operations.resume, operations.cancel),
        observe.events,
    ),
    "Registry as a file": (host.export, host.import_),
}


class App(Group):
    """The group of all commands."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what it fails with becomes text, an object and an exit code."""
        session = ctx.ensure_object(Session)
        try:
            return super().invoke(ctx)
        except ModelhostError as error:
            ctx.exit(failures.report(error, session.output))
        except BrokenPipeError:
            raise  # click ends the process quietly.
        except OSError as error:
            error_note(
                [f"modelhost: {error.strerror or error}: {error.filename or ''}".rstrip(": ")]
            )
            ctx.exit(failures.FAILURE)
        except KeyboardInterrupt:
            error_note(["", "modelhost: interrupted"])
            ctx.exit(failures.INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by section."""
        del ctx
        width = max(len(str(c.name)) for commands in SECTIONS.values() for c in commands)
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(str(c.name).ljust(width), c.get_short_help_str(limit=90)) for c in commands]
                )


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    del parameter
    if value:
        from modelhost import __version__

        click.echo(f"modelhost {__version__}")
        context.exit()


app = App(
    "modelhost",
    help="Many models on few GPUs: one daemon, gRPC. Start it with `modelhost serve`, then "
    "`modelhost pull hf://org/name`.",
    params=[
        *global_options(hidden=False),
        click.Option(
            ["--version"], is_flag=True, expose_value=False, is_eager=True,
            callback=_print_version, help="Show the version and exit.",
        ),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)  # fmt: skip
for _commands in SECTIONS.values():
    for _command in _commands:
        app.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit."""
    # What a terminal's encoding lacks is written out, as on stderr, rather than the end of the command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app.main(args=None if arguments is None else list(arguments), prog_name="modelhost")
    sys.exit(0)
