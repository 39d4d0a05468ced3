"""pull: one model with its bar, or several with one summary."""

from functools import partial
from typing import Any

import click

from modelhost.cli.batch import Batch, detached
from modelhost.cli.follow import ended, follow
from modelhost.cli.registry import (
    exclude_option,
    include_option,
    name_option,
    revision_option,
    task_option,
    to_bytes,
    url_option,
)
from modelhost.cli.session import Command, Session, complete_models, pass_session


@click.command(cls=Command)
@click.argument("sources", metavar="[SOURCE|MODEL]...", nargs=-1, shell_complete=complete_models)
@name_option
@task_option
@revision_option
@url_option
@include_option
@exclude_option
@click.option(
    "--priority", default=0, type=click.IntRange(-100, 100), help="The higher, the earlier."
)
@click.option(
    *("--rate", "--rate-limit", "rate_limit"),
    default="0",
    metavar="SIZE",
    help="The most bytes a second (5MB), of each.",
)
@click.option(
    "--allow-unsafe", is_flag=True, help="Fetch files that can run code, too (operators)."
)
@click.option("--refresh", is_flag=True, help="Ask for a newer revision of what is on disk, too.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait; print the operation.")
@pass_session
def pull(
    session: Session,
    sources: tuple[str, ...],
    name: str | None,
    task: str,
    revision: str,
    more_uris: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    priority: int,
    rate_limit: str,
    allow_unsafe: bool,
    refresh: bool,
    detach: bool,
) -> None:
    """Download models, and register first those that are new.

    SOURCE is hf://org/name@revision, https://host/file, github://owner/repo@tag/asset,
    ollama://name:tag, s3://bucket/prefix, gs://bucket/prefix, file:///path, or the id of a registered
    model, whose task --task changes. Several end with one summary, and with an error where one of
    them failed. `--url A --url B --name x` makes one model of several files. Ctrl-C leaves the
    downloads running.
    """
    if not sources:
        # The first of the URLs stands for the source.
        sources, more_uris = more_uris[:1], more_uris[1:]
    if not sources:
        raise click.UsageError("what is to be pulled? SOURCE, MODEL or --url URL")
    if len(sources) > 1 and (name is not None or task or revision or more_uris):
        raise click.UsageError("--name, --task, --revision and --url are for one model")
    options: dict[str, Any] = {
        "allow_patterns": include,
        "ignore_patterns": exclude,
        "priority": priority,
        "rate_limit_bytes_per_second": to_bytes(rate_limit, "--rate"),
        "allow_unsafe": allow_unsafe,
        "refresh": refresh,
        "wait": False,
    }
    one: dict[str, Any] = {"task": task, "revision": revision, "more_uris": more_uris}
    with session.client() as client:
        if len(sources) == 1:
            handle = client.pull(sources[0], name, **one, **options)
            if detach:
                detached(session, handle)
            else:
                ended(session, follow(session, handle))
            return
        batch = Batch(session)
        for source in sources:
            batch.begin(source, partial(client.pull, source, **options))
        batch.end(client, detach=detach)
