"""Results on stdout: tables for people, tab-separated lines for scripts, JSON for programs.

Whatever comes from the daemon may come from outside: nothing of it reaches a terminal as a control.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from modelhost._text import plain, plain_json

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")

TABLE_WIDTH = 160
"""Columns of a table that is asked for where there is no terminal."""
PROSE_WIDTH = 24
"""Columns that a sentence keeps, however narrow the terminal."""
BOUNDLESS = 10_000
GAP = 2
"""Columns between two of a table."""
NOTHING = frozenset({"", "-", "0", "for ever"})
"""What a cell has that tells nothing."""


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """A column: its title, its value for scripts, and what people see of the value."""

    title: str
    value: Callable[[T], Any]
    show: Callable[[Any], str] = str
    right: bool = False
    prose: bool = False
    """Whether it may be broken between words, where the terminal is narrow."""
    extra: int = 0
    """Whether it is left out where a terminal has no room for it, and how soon: the lower, the later; 0 = never."""


class Output:
    """One run's results, all in one format."""

    def __init__(self, format_: str, *, no_color: bool = False) -> None:
        self.json = format_ == "json"
        self.table = format_ == "table" or (format_ == "auto" and sys.stdout.isatty())
        self._no_color = no_color

    def rows(self, items: Sequence[T], columns: Sequence[Column[T]]) -> None:
        """Write a list: a table with a header, or a line for each item without one."""
        if not self.table:
            for item in items:
                self.line([column.value(item) for column in columns])
            return
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        shown = [[plain(c.show(c.value(item))) for c in columns] for item in items]
        widths = []
        for index, column in enumerate(columns):
            widest = max(map(cell_len, (column.title, *(row[index] for row in shown))))
            widths.append(min(widest, PROSE_WIDTH) if column.prose else widest)
        telling = [any(row[index] not in NOTHING for row in shown) for index in range(len(columns))]
        room = self._console().width if sys.stdout.isatty() else BOUNDLESS
        chosen = fitting(columns, widths, telling, room)
        for index in chosen:
            table.add_column(
                columns[index].title,
                justify="right" if columns[index].right else "left",
                overflow="fold",
                min_width=widths[index],
            )
        for row in shown:
            table.add_row(*(Text(row[index]) for index in chosen))
        self._print(table)
        left_out = [c.title for n, c in enumerate(columns) if n not in chosen and telling[n]]
        if left_out and items:
            error_note([f"a wider terminal also shows {', '.join(left_out)}"])

    def pairs(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Write names and values, those that are empty left out."""
        told = [(name, value) for name, value in pairs if value not in ("", None)]
        if not self.table:
            for name, value in told:
                self.line([name, value])
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in told:
            table.add_row(name, Text(plain(str(value))))
        self._print(table)

    def line(self, values: Iterable[object]) -> None:
        """Write one tab-separated line."""
        self._write("\t".join(plain(_word(value)) for value in values))

    def say(self, text: str) -> None:
        """Write a sentence for people; not in JSON."""
        if not self.json:
            self._write(plain(text))

    def blank(self) -> None:
        """Write an empty line between tables."""
        if self.table:
            self._write("")

    def document(self, value: object) -> None:
        """Write one JSON document."""
        self._write(dump(value, indent=2))

    def json_line(self, value: object) -> None:
        """Write one line of a stream of JSON lines, now."""
        self._write(dump(value))

    def _write(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def _print(self, table: "Table") -> None:
        """Write a table as wide as it needs: a terminal wraps a line better than we cut a name."""
        from rich.measure import Measurement

        console = self._console()
        boundless = console.options.update(width=BOUNDLESS)
        width = max(console.width, Measurement.get(console, boundless, table).minimum)
        console.size = (
            width,
            console.height,
        )  # Both: a dumb terminal has 80 columns whatever its width is.
        console.print(table)

    def _console(self) -> "Console":
        from rich.console import Console

        return Console(
            file=sys.stdout,
            width=None if sys.stdout.isatty() else TABLE_WIDTH,
            no_color=self._no_color or None,
            highlight=False,
        )


def fitting(
    columns: Sequence[Column[T]], widths: Sequence[int], telling: Sequence[bool], room: int
) -> list[int]:
    """Return which columns ``room`` is enough for: those that never go, then the others, the more telling first."""
    chosen = [index for index, column in enumerate(columns) if not column.extra]
    left = room + GAP - sum(widths[index] + GAP for index in chosen)
    others = (index for index, column in enumerate(columns) if column.extra)
    for index in sorted(others, key=lambda n: (not telling[n], columns[n].extra)):
        if widths[index] + GAP <= left:
            left -= widths[index] + GAP
            chosen.append(index)
    return sorted(chosen)


def to_dict(message: "Message") -> dict[str, Any]:
    """Return a message in the contract's JSON form, as HTTP and `buf curl` show it."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, always_print_fields_with_no_presence=True)


def dump(value: object, indent: int | None = None) -> str:
    """Return JSON that is safe to show, whatever is in its strings."""
    # Another encoding may lack a character, and what stands for it then is no JSON.
    ascii_only = (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8")
    return plain_json(json.dumps(value, indent=indent, ensure_ascii=ascii_only, default=str))


def error_note(lines: Iterable[str]) -> None:
    """Write lines for people on stderr."""
    for line in lines:
        sys.stderr.write(plain(line) + "\n")
    sys.stderr.flush()


def counted(number: int, one: str, many: str = "") -> str:
    """Return ``1 file`` or ``2 files``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def joined(values: Mapping[str, str]) -> str:
    """Return ``k=v k=v``."""
    return " ".join(f"{key}={value}" for key, value in sorted(values.items()))


def _word(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
