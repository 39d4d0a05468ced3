"""upload, outdated: files of this machine for the host, and files of the host beside their sources."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelhost.cli.failures import FAILURE, INTERRUPTED
from modelhost.cli.output import Column, counted, error_note, to_dict
from modelhost.cli.registry import exclude_option, include_option, task_option
from modelhost.cli.session import Command, Session, complete_models, model_argument, pass_session

if TYPE_CHECKING:
    from modelhost._freshness import Compared

OUTDATED = 5


@click.command(cls=Command)
@model_argument
@click.argument(
    "paths",
    nargs=-1,
    required=True,
    metavar="FILE|FOLDER...",
    type=click.Path(exists=True, path_type=Path),
)
@task_option
@include_option
@exclude_option
@click.option("--revision", default="", metavar="TEXT", help="What the version is to be called.")
@pass_session
def upload(
    session: Session,
    model: str,
    paths: tuple[Path, ...],
    task: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    revision: str,
) -> None:
    """Bring files of this machine to the host as a new version of MODEL, registered where it is new.

    Of a folder all that is below it is taken, but for names that begin with a dot. What broke, or was
    ended by Ctrl-C, goes on from what is there when the command runs again.
    """
    from modelhost._names import short
    from modelhost._text import plain, show_bytes

    output = session.output
    report: Any = True
    if output.json:
        report = lambda operation: output.json_line(to_dict(operation))  # noqa: E731
    try:
        with session.client() as client:
            done = client.upload(
                model,
                paths,
                task=task,
                revision=revision,
                include=include,
                exclude=exclude,
                progress=report,
                timeout=session.timeout,
            )
    except KeyboardInterrupt:
        error_note(["", "modelhost: interrupted; run it again to go on from what is there"])
        click.get_current_context().exit(INTERRUPTED)
    if output.json:
        output.json_line(to_dict(done))
        return
    (made,) = (a for a in done.model.artifacts if a.version == done.version)
    output.say(
        f"upload {plain(short(done.model.name))}: {counted(made.file_count, 'file')}, "
        f"{show_bytes(made.size_bytes)}, version {done.version}"
    )


@click.command(cls=Command)
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=complete_models)
@click.pass_context
def outdated(context: click.Context, models: tuple[str, ...]) -> None:
    """Compare models, by default all, with what their sources have now.

    The exit code is 1 where a source could not be asked, else 5 where a model is outdated, else 0.
    `modelhost pull --refresh MODEL` fetches the new revision beside the one that is there, `modelhost
    reload MODEL` has it served; `modelhost show MODEL` lists the versions that are kept.
    """
    from modelhost._freshness import Freshness
    from modelhost._names import short

    session = context.ensure_object(Session)
    output = session.output
    with session.client() as client:
        found = list(client.outdated(models))
    if output.json:
        output.document([_as_object(one) for one in found])
    else:
        columns: list[Column[Compared]] = [
            Column("MODEL", lambda c: short(c.model)),
            Column("FILES", lambda c: c.freshness.value),
            Column("HERE", lambda c: c.revision[:12]),
            Column("SOURCE", lambda c: c.newest[:12]),
            Column("WHY", lambda c: c.error.message if c.error is not None else "", prose=True),
        ]
        output.rows(found, columns)
    states = {one.freshness for one in found}
    if Freshness.UNKNOWN in states:
        context.exit(FAILURE)
    if Freshness.OUTDATED in states:
        context.exit(OUTDATED)


def _as_object(one: "Compared") -> dict[str, object]:
    return {
        "model": one.model,
        "freshness": one.freshness.name,
        "revision": one.revision,
        "newest": one.newest,
        "error": one.error.message if one.error is not None else "",
        "reason": one.error.reason if one.error is not None else "",
    }
