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

from modelhost.cli.output import Output, to_dict
from modelhost.cli.session import Command, Session, pass_session

if TYPE_CHECKING:
    from modelhost import Client
    from modelhost.v1.host_pb2 import Statistics

KEY_S = 0.1
"""How long a key may wait for an answer."""
AGES_S = 1.0
"""How often ages are written anew where nothing else changes."""


@click.command(cls=Command)
@click.option("--interval", type=click.FloatRange(0.25, 60), default=1.0, show_default=True,
              metavar="SECONDS", help="The least time between two looks.")  # fmt: skip
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="LOOKS",
              help="End after so many. Default: on a terminal none, else 1.")  # fmt: skip
@pass_session
def top(session: Session, interval: float, count: int | None) -> None:
    """Show devices and what is in memory, live: q or Ctrl-C ends it.

    RANK OR WHY is the place in the order of eviction, 1 = first to go, or what keeps it. A narrow terminal has
    fewer columns. Without a terminal: tab-separated lines, one for each device, instance and operation.
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

    from modelhost.cli.top_view import picture

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


# --- without a terminal ---------------------------------------------------------------------------


def _plain(output: Output, found: "Statistics") -> None:
    """Write a look as lines for scripts: what it is, then its figures; or as tables, where they are asked for."""
    from modelhost._names import short
    from modelhost.cli.top_view import by_rank, columns, work_line

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
        output.line(["operation", short(operation.operation), work_line(operation)])
