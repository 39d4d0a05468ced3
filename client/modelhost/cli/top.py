"""top: who is in memory and what it does, as it changes."""

import contextlib
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from modelhost.cli.output import Column, Output, to_dict
from modelhost.cli.session import Command, Session, pass_session

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from modelhost import Client
    from modelhost.v1.host_pb2 import Statistics

    Device = Statistics.DeviceStatistics
    Instance = Statistics.InstanceStatistics

KEY_S = 0.1
"""How long a key may wait for an answer."""
AGES_S = 1.0
"""How often ages are written anew where nothing else changes."""
BAR_CELLS = 40


@click.command(cls=Command)
@click.option("--interval", type=click.FloatRange(0.25, 60), default=1.0, show_default=True,
              metavar="SECONDS", help="The least time between two looks.")  # fmt: skip
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="LOOKS",
              help="End after so many. Default: on a terminal none, else 1.")  # fmt: skip
@pass_session
def top(session: Session, interval: float, count: int | None) -> None:
    """Show devices and what is in memory, live: q or Ctrl-C ends it.

    RANK is the place in the order of eviction, 1 = first to go; where there is none, WHY says what keeps
    it. Without a terminal: tab-separated lines, one for each device, instance and operation.
    """
    output = session.output
    live = output.table and sys.stdout.isatty()
    with session.client() as client:
        if live:
            with contextlib.suppress(KeyboardInterrupt):
                _live(client, interval, count, no_color=session.no_color)
            return
        looks = count or 1
        for number, found in enumerate(client.watch_statistics(interval), 1):
            if output.json:
                output.json_line(to_dict(found))
            else:
                _plain(output, found)
            if number == looks:
                return


# --- live -----------------------------------------------------------------------------------------


def _live(client: "Client", interval: float, count: int | None, *, no_color: bool) -> None:
    """Draw each message, and the ages in between, until a key or Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    console = Console(no_color=no_color or None, highlight=False)
    messages: queue.SimpleQueue[Statistics | Exception | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(client, interval, messages), daemon=True).start()
    shown: Statistics | None = None
    looks, drawn = 0, 0.0
    with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as screen:
        while count is None or looks < count:
            if _quit(keys):
                return
            with contextlib.suppress(queue.Empty):
                message = messages.get_nowait() if keys else messages.get(timeout=KEY_S)
                if message is None:
                    return
                if isinstance(message, Exception):
                    raise message
                shown, drawn, looks = message, 0.0, looks + 1
            now = time.monotonic()
            if shown is not None and now - drawn >= AGES_S:
                drawn = now
                screen.update(picture(shown, console), refresh=True)


def _read(
    client: "Client",
    interval: float,
    messages: "queue.SimpleQueue[Statistics | Exception | None]",
) -> None:
    try:
        for message in client.watch_statistics(interval):
            messages.put(message)
    except Exception as error:
        messages.put(error)
    else:
        messages.put(None)


@contextlib.contextmanager
def _keys() -> Iterator[Sequence[int]]:
    """Give the descriptor that keys come from, each at once and unseen; none where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield ()
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield (descriptor,)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _quit(keys: Sequence[int]) -> bool:
    """Wait a moment for a key; whether it was q, or the terminal is gone."""
    if not keys:
        return False
    ready, _, _ = select.select(keys, [], [], KEY_S)
    return bool(ready) and os.read(ready[0], 64)[:1] in (b"q", b"Q", b"")


def picture(found: "Statistics", console: "Console") -> "RenderableType":
    """Return what the screen shows; what does not fit into it is counted."""
    from rich.console import Group
    from rich.text import Text

    from modelhost.cli import views

    head = (
        f"modelhost  up {views.span(found.uptime)}  requests {found.request_count} "
        f"({found.error_count} with an error)  in flight {found.in_flight}  queued {found.queued}"
    )
    bars = [bar(device) for device in found.devices]
    if found.host_tier_budget_bytes or found.host_tier_bytes:
        bars.append(_bar("host memory", found.host_tier_bytes, 0, found.host_tier_budget_bytes))
    work = [Text(_work_line(o)) for o in found.operations[:5]]
    instances = by_rank(found.instances)
    room = max(1, console.height - len(bars) - len(work) - 6)
    parts: list[RenderableType] = [Text(head, style="bold"), *bars, Text("")]
    parts.append(_table(instances[:room]))
    if len(instances) > room:
        parts.append(Text(f"... and {len(instances) - room} more"))
    if work:
        parts += [Text(""), *work]
    return Group(*parts)


def by_rank(instances: "Sequence[Instance]") -> "list[Instance]":
    """Return instances with those that go last first: what is kept, then by falling rank."""
    return sorted(
        instances,
        key=lambda i: (
            i.device,
            i.activity.eviction_rank > 0,
            -i.activity.eviction_rank,
            i.model,
        ),
    )


def bar(device: "Device") -> "RenderableType":
    """Return a device's memory as a bar: resident, reserved, free of the budget."""
    from modelhost._names import short

    name = short(device.device)
    resident, reserved = device.resident_bytes, device.reserved_bytes
    line = _bar(name, resident, reserved, device.budget_bytes)
    if device.foreign_bytes:
        from modelhost._text import show_bytes

        line.append(f", {show_bytes(device.foreign_bytes)} used by others")
    return line


def _bar(name: str, resident: int, reserved: int, budget: int) -> "Text":
    from rich.text import Text

    from modelhost._text import plain, show_bytes

    whole = max(budget, resident + reserved, 1)
    full = round(BAR_CELLS * resident / whole)
    half = min(BAR_CELLS - full, round(BAR_CELLS * reserved / whole))
    line = Text(f"{plain(name):<12} ")
    line.append("█" * full, style="red" if resident + reserved > budget else "green")
    line.append("▒" * half, style="yellow")
    line.append("·" * (BAR_CELLS - full - half), style="dim")
    line.append(f" {show_bytes(resident)}")
    if reserved:
        line.append(f" + {show_bytes(reserved)} reserved")
    line.append(f" of {show_bytes(budget)}")
    return line


# --- rows -----------------------------------------------------------------------------------------


def columns() -> "list[Column[Instance]]":
    """Return what is shown of an instance."""
    from modelhost._enums import name_of
    from modelhost._names import short
    from modelhost.cli import views
    from modelhost.v1 import instances_pb2 as pb

    blockers = pb.InstanceActivity.EvictBlocker

    def why(instance: "Instance") -> str:
        return ",".join(name_of(blockers, b).lower() for b in instance.activity.evict_blockers)

    return [
        Column("MODEL", lambda i: short(i.model)),
        Column("DEVICE", lambda i: short(i.device), views.word),
        Column("STATE", lambda i: name_of(pb.Instance.State, i.state), str.lower),
        Column("TIER", lambda i: name_of(pb.Instance.Tier, i.tier), str.lower),
        Column("PREDICTED", lambda i: i.predicted_bytes, views.size, right=True),
        Column("DEVICE MEM", lambda i: i.device_bytes, views.size, right=True),
        Column("HOST MEM", lambda i: i.host_bytes, views.size, right=True),
        Column("HEALTH", lambda i: name_of(pb.Health.Status, i.health), str.lower),
        Column("IN FLIGHT", lambda i: i.activity.in_flight, right=True),
        Column("QUEUED", lambda i: i.activity.queued, right=True),
        Column("REQUESTS", lambda i: i.activity.request_count, right=True),
        Column("LAST USED", lambda i: views.when(i.activity.last_used_time), views.ago),
        Column("RANK", lambda i: i.activity.eviction_rank or "", views.word, right=True),
        Column("WHY", why),
    ]


def _table(instances: "Sequence[Instance]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from modelhost._text import plain

    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = columns()
    for column in shown:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for instance in instances:
        table.add_row(*(Text(plain(c.show(c.value(instance)))) for c in shown))
    return table


def _work_line(operation: "Statistics.OperationStatistics") -> str:
    from modelhost._enums import name_of
    from modelhost._names import short
    from modelhost._progress import amounts, phase_word
    from modelhost._text import plain
    from modelhost.v1.operations_pb2 import Operation

    whole = Operation(state=operation.state, progress=operation.progress)
    kind = name_of(Operation.Kind, operation.kind).lower()
    told = f"{kind} {short(operation.model)} {phase_word(whole)} {amounts(whole)}"
    return plain(" ".join(told.split()))


def _plain(output: Output, found: "Statistics") -> None:
    """Write a look as lines for scripts: what it is, then its figures; or as tables, where they are asked for."""
    from modelhost._names import short

    if output.table:
        from modelhost._text import show_bytes

        for device in found.devices:
            used = device.resident_bytes + device.reserved_bytes
            output.say(
                f"{short(device.device)}: {show_bytes(used)} of {show_bytes(device.budget_bytes)}"
            )
        output.rows(by_rank(found.instances), columns())
        return
    for device in found.devices:
        output.line(
            [
                "device", short(device.device), device.resident_bytes, device.reserved_bytes,
                device.budget_bytes, device.foreign_bytes,
            ]
        )  # fmt: skip
    for instance in by_rank(found.instances):
        output.line(["instance", *(column.value(instance) for column in columns())])
    for operation in found.operations:
        output.line(["operation", short(operation.operation), _work_line(operation)])
