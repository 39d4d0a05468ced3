"""events: what happened, and what happens."""

from typing import TYPE_CHECKING, Any

import click

from modelhost.cli.output import Output, error_note, joined, to_dict
from modelhost.cli.session import Command, Session, pass_session

if TYPE_CHECKING:
    from modelhost import Client, ModelhostError, WatchItem
    from modelhost.v1.events_pb2 import Event, Resource


@click.command(cls=Command)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option(
    "--since", type=click.IntRange(min=0), metavar="SEQUENCE", help="The events behind this one."
)
@click.option("--snapshot", is_flag=True, help="The whole state first; without -f nothing else.")
@click.option("--progress", is_flag=True, help="With -f: how far operations are, too.")
@click.option("-n", "--lines", type=click.IntRange(min=0), default=20, show_default=True,
              help="How many past events, where neither --since nor --snapshot says.")  # fmt: skip
@click.option("--model", "models", multiple=True, metavar="MODEL", help="Only what concerns it.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only models, instances, ...")
@click.option("--reason", "reasons", multiple=True, metavar="REASON", help="Only events with it.")
@pass_session
def events(
    session: Session,
    follow: bool,
    since: int | None,
    snapshot: bool,
    progress: bool,
    lines: int,
    models: tuple[str, ...],
    kinds: tuple[str, ...],
    reasons: tuple[str, ...],
) -> None:
    """Show events: the last ones, those behind a sequence, or all that happens from now on.

    A watch goes on by itself when the daemon restarts, and misses nothing.
    """
    if snapshot and since is not None:
        raise click.UsageError(
            "--snapshot begins with the present, --since in the past: choose one"
        )
    if progress and not follow:
        raise click.UsageError("--progress is of what happens: it belongs to --follow")
    filters: dict[str, Any] = {"models": models, "kinds": kinds, "reasons": reasons}
    with session.client() as client:
        last = since
        if not snapshot:
            if since is None:
                last = _before_last(client, lines)
            for event in client.events(last, **filters):
                show(session.output, event)
                last = event.sequence
        if snapshot or follow:
            _watch(session, client, None if snapshot else last, progress, follow, filters)


def _watch(
    session: Session,
    client: "Client",
    since: int | None,
    progress: bool,
    follow: bool,
    filters: dict[str, Any],
) -> None:
    from modelhost.v1.events_pb2 import Bookmark

    watch = client.watch(
        since,
        progress=progress,
        reconnecting=_Reconnecting(),
        **filters,
    )
    with watch:
        for item in watch:
            if isinstance(item, Bookmark) and since is not None:
                since = None
                continue
            show(session.output, item)
            if isinstance(item, Bookmark) and not follow:
                return


def _before_last(client: "Client", lines: int) -> int:
    """Return the sequence behind which the last ``lines`` events are."""
    host = client.host()
    if lines == 0:
        return host.sequence
    oldest = next(client.events(limit=1), None)
    kept = oldest.sequence - 1 if oldest is not None else host.sequence
    return max(kept, host.sequence - lines)


class _Reconnecting:
    """Says why a watch has to connect again: each reason once, not each try."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, error: "ModelhostError | None", delay: float) -> None:
        del delay
        why = error.message if error is not None else "the daemon closed the stream"
        if why != self._last:
            self._last = why
            error_note([f"modelhost: {why}; trying again until it is back"])


def show(output: Output, item: "WatchItem") -> None:
    """Write one item of a watch: a line for people and scripts, or an object named by its kind."""
    from modelhost import Reset
    from modelhost.cli.views import when
    from modelhost.v1.events_pb2 import Bookmark, Event, Resource

    if output.json:
        output.json_line(as_object(item))
    elif isinstance(item, Event):
        output.line(_event_line(item))
    elif isinstance(item, Resource):
        output.line(["", "", *_named(item), "PRESENT", "", summary(item)])
    elif isinstance(item, Bookmark):
        output.line([item.sequence, when(item.time), "", "", "BOOKMARK", "", ""])
    elif isinstance(item, Reset):
        output.line([item.sequence, "", "", "", "RESET", item.reason, "forget what came before"])
    else:
        from modelhost._progress import amounts
        from modelhost.v1.operations_pb2 import Operation

        shown = Operation(state=Operation.RUNNING, progress=item.progress)
        output.line(["", "", "OPERATION", item.operation, "PROGRESS", "", amounts(shown)])


def as_object(item: "WatchItem") -> dict[str, object]:
    """Return an item of a watch as JSON: its kind, and the message."""
    from modelhost import Reset

    if isinstance(item, Reset):
        return {"reset": {"reason": item.reason, "sequence": str(item.sequence)}}
    name = type(item).__name__
    return {name[0].lower() + name[1:]: to_dict(item)}


def summary(resource: "Resource") -> str:
    """Return the state of a resource in a few words."""
    from modelhost._enums import name_of
    from modelhost._progress import amounts, phase_word
    from modelhost.cli import views

    which = resource.WhichOneof("resource")
    match which:
        case "model":
            pinned = " pinned" if resource.model.pinned else ""
            return views.state_of(resource.model) + pinned
        case "instance":
            state = name_of(views.Instance.State, resource.instance.state)
            return f"{state} {resource.instance.device}".strip()
        case "operation":
            operation = resource.operation
            kind = name_of(views.Operation.Kind, operation.kind)
            told = f"{kind} {operation.model} {phase_word(operation)}"
            return f"{told} {amounts(operation)} {operation.error.message}".strip()
        case "device":
            return f"budget {resource.device.budget_bytes}"
        case "slot":
            return resource.slot.model
        case "lease":
            return resource.lease.model
    return ""


def _event_line(event: "Event") -> list[object]:
    from modelhost._enums import name_of
    from modelhost.cli.views import when
    from modelhost.v1.events_pb2 import Event, Resource

    return [
        event.sequence,
        when(event.time),
        name_of(Resource.Kind, event.kind),
        event.name,
        name_of(Event.Change, event.change),
        event.reason,
        f"{summary(event.resource)} {joined(event.details)}".strip(),
    ]


def _named(resource: "Resource") -> list[str]:
    which = resource.WhichOneof("resource") or ""
    message = getattr(resource, which, None)
    return [which.upper(), getattr(message, "name", "")]
