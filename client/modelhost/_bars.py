"""Progress as bars on a terminal: one for each operation, one for each of its files under way, one for all."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from modelhost._follow import is_final
from modelhost._progress import amounts, phase_word, title, without_room
from modelhost._text import plain, show_bytes, show_seconds
from modelhost.v1 import operations_pb2

Operation = operations_pb2.Operation

FILES_MAX = 6
"""Files of one operation that have a bar at a time."""
NAME_CHARS_MAX = 40


@contextlib.contextmanager
def bars(stream: TextIO, console: Console | None = None) -> Iterator[Callable[[Operation], None]]:
    """Show bars on ``stream`` for every operation that is reported; they are gone at the end."""
    with Progress(
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[percent]}", markup=False),
        TextColumn("{task.fields[amounts]}", markup=False),
        TextColumn("{task.fields[phase]}", markup=False),
        console=console or Console(file=stream),
        transient=True,
    ) as progress:
        yield _Bars(progress)


class _Bars:
    """What is shown of operations so far."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[tuple[str, str], TaskID] = {}
        """By operation and file; the operation's own has no file, that of all neither."""
        self._operations: dict[str, Operation] = {}

    def __call__(self, operation: Operation) -> None:
        """Show a state of an operation."""
        before = self._operations.get(operation.name)
        self._operations[operation.name] = operation
        waits = without_room(operation)
        if waits and (before is None or not without_room(before)):
            # Above the bars, where it stays: it says what to do.
            text = f"{title(operation)}: {waits}"
            self._progress.console.print(text, markup=False, highlight=False)
        done, total = operation.progress.done_bytes, operation.progress.total_bytes
        words = amounts(operation)
        self._show(
            (operation.name, ""), title(operation), done, total, words, phase_word(operation)
        )
        files = [] if is_final(operation) else _under_way(operation)
        for file in files:
            self._show_file((operation.name, file.path), file)
        kept = {file.path for file in files} | {""}
        for name, path in list(self._tasks):
            if name == operation.name and path not in kept:
                self._progress.remove_task(self._tasks.pop((name, path)))
        if len(self._operations) > 1:
            self._show_all()

    def _show_file(
        self, key: tuple[str, str], file: operations_pb2.OperationProgress.FileProgress
    ) -> None:
        shown = plain(file.path)
        if len(shown) > NAME_CHARS_MAX:
            shown = f"...{shown[3 - NAME_CHARS_MAX :]}"
        words = f"{show_bytes(file.done_bytes)} of {show_bytes(file.size_bytes)}"
        if (rate := self._rate(key)) >= 1:
            left = (file.size_bytes - file.done_bytes) / rate
            words += f", {show_bytes(int(rate))}/s, {show_seconds(left)} left"
        self._show(key, f"  {shown}", file.done_bytes, file.size_bytes, words, "")

    def _show_all(self) -> None:
        """One bar for all: what is known of their bytes, and how many have ended."""
        progress = [operation.progress for operation in self._operations.values()]
        done = sum(one.done_bytes for one in progress)
        total = sum(one.total_bytes for one in progress)
        ended = sum(map(is_final, self._operations.values()))
        words = [f"{show_bytes(done)} of {show_bytes(total)}"]
        running = [o for o in self._operations.values() if o.state == Operation.RUNNING]
        rate = sum(operation.progress.bytes_per_second for operation in running)
        if rate >= 1:
            words += [f"{show_bytes(int(rate))}/s", f"{show_seconds((total - done) / rate)} left"]
        key = ("", "")
        if key in self._tasks:
            # Behind all others, whenever they came.
            self._progress.remove_task(self._tasks.pop(key))
        count = f"{ended} of {len(self._operations)} ended"
        self._show(key, "all", done, total, ", ".join(words), count)

    def _rate(self, key: tuple[str, str]) -> float:
        """Return the bytes a second of a bar, over the last half minute."""
        if (task := self._tasks.get(key)) is None:
            return 0.0
        return next((one.speed or 0.0 for one in self._progress.tasks if one.id == task), 0.0)

    def _show(
        self, key: tuple[str, str], name: str, done: int, total: int, words: str, phase: str
    ) -> None:
        percent = f"{100 * done // total:3d} %" if total else ""
        shown: dict[str, Any] = {
            "title": name,
            "percent": percent,
            "amounts": words,
            "phase": phase,
        }
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task("", total=total or None, **shown)
        self._progress.update(self._tasks[key], total=total or None, completed=done, **shown)


def _under_way(
    operation: Operation,
) -> list[operations_pb2.OperationProgress.FileProgress]:
    """Return the files that have begun and not ended, the largest first, a few."""
    begun = [f for f in operation.progress.files if 0 < f.done_bytes < f.size_bytes]
    return sorted(begun, key=lambda file: -file.size_bytes)[:FILES_MAX]
