"""What one run of the command has: the global options, a client, and where output goes."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from modelhost.cli.output import Output

if TYPE_CHECKING:
    from modelhost import Client

TIMEOUT_S = 30.0
INFER_TIMEOUT_S = 300.0
FORMATS = ("auto", "table", "json")


@dataclass(slots=True)
class Session:
    """The global options, as far as they were given."""

    target: str | None = None
    timeout: float | None = None
    format: str = "auto"
    no_color: bool = False

    @property
    def output(self) -> Output:
        """Where results go, in the format that was asked for."""
        return Output(self.format, no_color=self.no_color)

    @contextlib.contextmanager
    def client(self) -> Iterator["Client"]:
        """Return a client that tries once: a person who waits is better told at once."""
        import os

        # grpc writes what it notes of connections to stderr, between our lines.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from modelhost import Client

        with Client(
            self.target,
            timeout=self.timeout or TIMEOUT_S,
            infer_timeout=self.timeout or INFER_TIMEOUT_S,
            retries=False,
        ) as client:
            yield client


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keep a global option, wherever on the line it stands; the last one wins."""
    if value in (None, False):
        return
    session = context.ensure_object(Session)
    if parameter.name == "json":
        session.format = "json"
    else:
        setattr(session, str(parameter.name), value)


def global_options(*, hidden: bool) -> list[click.Parameter]:
    """Return the options that stand before or behind a command's name."""
    shared: dict[str, Any] = {"expose_value": False, "callback": _store, "hidden": hidden}
    return [
        click.Option(
            ["--target"],
            metavar="TARGET",
            help="The daemon: HOST:PORT or unix:PATH. Default: $MODELHOST_TARGET, a socket that "
            "answers, 127.0.0.1:7411.",
            **shared,
        ),
        click.Option(
            ["--timeout"],
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="How long a call, or waiting for an operation, may take.",
            **shared,
        ),
        click.Option(["--json"], is_flag=True, help="The same as --format json.", **shared),
        click.Option(
            ["--format"],
            type=click.Choice(FORMATS),
            help="auto: tables on a terminal, else tab-separated lines. json: the contract's JSON; "
            "streams as JSON lines.",
            **shared,
        ),
        click.Option(["--no-color"], is_flag=True, help="No colours; so does $NO_COLOR.", **shared),
    ]


class Command(click.Command):
    """A command that takes the global options, too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.extend(global_options(hidden=True))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say where the other options are."""
        formatter.write_paragraph()
        formatter.write_text("Global options (modelhost --help) may stand here, too.")


class Group(click.Group):
    """Commands below one name."""

    command_class = Command


pass_session = click.make_pass_decorator(Session, ensure=True)


def complete_models(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> Sequence[str]:
    """Return the ids of models for the shell; none where the daemon does not answer at once."""
    del parameter
    from modelhost._errors import ModelhostError
    from modelhost._names import short

    session = context.ensure_object(Session)
    session.timeout = 1.0
    try:
        with session.client() as client:
            return [n for m in client.models() if (n := short(m.name)).startswith(incomplete)]
    except ModelhostError:
        return []


model_argument = click.argument("model", shell_complete=complete_models)
"""The decorator for the argument MODEL."""
