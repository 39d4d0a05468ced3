"""What top draws: a line of totals, a bar for each place, and of the instances what the terminal has room for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelhost.cli.output import Column

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from modelhost.v1.host_pb2 import Statistics

    Instance = Statistics.InstanceStatistics

BAR_CELLS = 40
BAR_CELLS_MIN = 8
LABEL_CELLS = 16
GAP = 2
"""Cells between columns."""
WORK_LINES = 5
WORK_PART = 6
"""The part of the screen that operations take at most."""
HEADER_LINES = 2
MODEL, RANK = "MODEL", "RANK OR WHY"
LASTING = ("leased", "pinned")
FLEXIBLE = {MODEL: 16, RANK: 9}
"""Columns that may be cut, and to how many cells."""
WHY_CELLS = 16
LEFT_OUT = (
    "REQUESTS", "QUEUED", "TIER", "HOST MEM", "HEALTH", "DEVICE", "PREDICTED", "LAST USED", "IN FLIGHT",
    "DEVICE MEM", "STATE",
)  # fmt: skip
"""What a narrow terminal does without, first to go first."""


def picture(found: "Statistics", console: "Console") -> "RenderableType":
    """Return what the screen shows; rows that do not fit into it are counted, columns are left out."""
    from rich.console import Group
    from rich.text import Text

    from modelhost.cli import views

    head = (
        f"modelhost  up {views.span(found.uptime)}  in flight {found.in_flight}  queued {found.queued}  "
        f"requests {found.request_count} ({found.error_count} with an error)"
    )
    bars = _bars(found, console.width)
    work = [work_line(o) for o in found.operations[: min(WORK_LINES, console.height // WORK_PART)]]
    instances = by_rank(found.instances)
    around = 1 + len(bars) + 1 + HEADER_LINES + (1 + len(work) if work else 0)
    room = max(1, console.height - around - 1)
    parts: list[RenderableType] = [_line(head, style="bold"), *bars, Text("")]
    parts.append(_table(instances[:room], console.width))
    if len(instances) > room:
        parts.append(_line(f"... and {len(instances) - room} more"))
    if work:
        parts += [Text(""), *map(_line, work)]
    return Group(*parts)


def by_rank(instances: "Sequence[Instance]") -> "list[Instance]":
    """Return instances by place: those that are nowhere for a trouble they have, each device's, those in host memory.

    In each place with those that go last first: what is kept, then by falling rank.
    """
    from modelhost.v1 import instances_pb2 as pb

    trouble, warm = (pb.Instance.BLOCKED, pb.Instance.FAILED), pb.Instance.WARM
    return sorted(
        instances,
        key=lambda i: (
            i.state not in trouble,
            i.state == warm,
            "" if i.state == warm else i.device,
            i.activity.eviction_rank > 0,
            -i.activity.eviction_rank,
            i.model,
        ),
    )


def work_line(operation: "Statistics.OperationStatistics") -> str:
    """Return what an operation is and how far it is."""
    from modelhost._enums import name_of
    from modelhost._names import short
    from modelhost._progress import amounts, phase_word
    from modelhost._text import plain
    from modelhost.v1.operations_pb2 import Operation

    whole = Operation(state=operation.state, progress=operation.progress)
    kind = name_of(Operation.Kind, operation.kind).lower()
    told = f"{kind} {short(operation.model)} {phase_word(whole)} {amounts(whole)}"
    return plain(" ".join(told.split()))


def _line(text: str, style: str = "") -> "Text":
    """Return one line, cut where the terminal ends."""
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


# --- bars -----------------------------------------------------------------------------------------


def _bars(found: "Statistics", width: int) -> "list[Text]":
    """Return a line for each device, and for host memory: resident, reserved, free of the budget."""
    from modelhost._names import short
    from modelhost._text import plain

    places = [
        (plain(short(d.device)), d.resident_bytes, d.reserved_bytes, d.budget_bytes, d.foreign_bytes)
        for d in found.devices
    ]  # fmt: skip
    if found.host_tier_budget_bytes or found.host_tier_bytes:
        places.append(("host memory", found.host_tier_bytes, 0, found.host_tier_budget_bytes, 0))
    label = min(LABEL_CELLS, max((len(place[0]) for place in places), default=0))
    return [
        _bar(f"{_cut(name, label):<{label}}", resident, reserved, budget, foreign, width)
        for name, resident, reserved, budget, foreign in places
    ]


def _bar(label: str, resident: int, reserved: int, budget: int, foreign: int, width: int) -> "Text":
    from modelhost._text import show_bytes

    whole = max(budget, resident + reserved, 1)
    told = show_bytes(resident)
    if reserved:
        told += f" + {show_bytes(reserved)} reserved"
    told += f" of {show_bytes(budget)}"
    short = f"{100 * (resident + reserved) // max(budget, 1)} % of {show_bytes(budget)}"
    others = f", {show_bytes(foreign)} used by others" if foreign else ""
    room = width - len(label) - 2
    fits = (t for t in (told + others, told) if room - len(t) >= BAR_CELLS_MIN)
    text = next(fits, short)
    cells = max(0, min(BAR_CELLS, room - len(text)))
    full = round(cells * resident / whole)
    half = min(cells - full, round(cells * reserved / whole))
    line = _line(f"{label} ")
    line.append("█" * full, style="red" if resident + reserved > budget else "green")
    line.append("▒" * half, style="yellow")
    line.append("·" * (cells - full - half), style="dim")
    line.append(f" {text}")
    return line


# --- rows -----------------------------------------------------------------------------------------


def columns() -> "list[Column[Instance]]":
    """Return what is told of an instance."""
    from modelhost._enums import name_of
    from modelhost._names import short
    from modelhost.cli import views
    from modelhost.v1 import instances_pb2 as pb

    return [
        Column(MODEL, lambda i: short(i.model)),
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


def why(instance: "Instance") -> str:
    """Return what keeps an instance where it is; empty = nothing."""
    from modelhost._enums import name_of
    from modelhost.v1 import instances_pb2 as pb

    blockers = pb.InstanceActivity.EvictBlocker
    return ",".join(name_of(blockers, b).lower() for b in instance.activity.evict_blockers)


def _live_columns() -> "list[Column[Instance]]":
    """Return the same for people, in less room: an instance has a place in the order of eviction, or it is kept."""
    from modelhost.cli import views

    def last(instance: "Instance") -> str:
        # As much as matters: 5 min ago, without the seconds.
        told = views.ago(views.when(instance.activity.last_used_time)).split()
        return " ".join([*told[:2], *told[-1:]]) if len(told) > 3 else " ".join(told)

    def place(instance: "Instance") -> object:
        # What lasts longest comes first; what is on its way says so as its state.
        words = {word for word in why(instance).split(",") if word != "in_transition"}
        kept = sorted(words, key=lambda word: (word not in LASTING, word))
        return instance.activity.eviction_rank or ",".join(kept)

    rank: Column[Instance] = Column(RANK, place, views.word)
    used: Column[Instance] = Column("LAST USED", last)
    found = {c.title: c for c in columns()} | {"LAST USED": used, RANK: rank}
    return [c for title, c in found.items() if title not in ("RANK", "WHY")]


def _table(instances: "Sequence[Instance]", width: int) -> "Table":
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    from modelhost._text import plain

    shown = _live_columns()
    cells = [[plain(c.show(c.value(i))) for i in instances] for c in shown]
    natural = {
        c.title: max(map(cell_len, (*_heading(c.title).split("\n"), *texts)))
        for c, texts in zip(shown, cells, strict=True)
    }
    widths = fitting(natural, width)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    rows = []
    for column, texts in zip(shown, cells, strict=True):
        if column.title in widths:
            cut = widths[column.title]
            table.add_column(
                _heading(column.title),
                justify="right" if column.right else "left",
                no_wrap=True,
                overflow="ellipsis",
                width=cut,
                vertical="bottom",
            )
            rows.append([_cut(t, cut) if column.title == MODEL else t for t in texts])
    for row in zip(*rows, strict=True):
        table.add_row(*map(Text, row))
    return table


def fitting(natural: dict[str, int], width: int) -> dict[str, int]:
    """Return the columns that fit into a width, and how wide each is; what they would like to be is ``natural``."""
    kept = dict(natural)
    for title in LEFT_OUT:
        least = sum(min(w, FLEXIBLE.get(t, w)) for t, w in kept.items())
        if least + GAP * (len(kept) - 1) <= width:
            break
        kept.pop(title, None)
    left = width - GAP * (len(kept) - 1) - sum(min(w, FLEXIBLE.get(t, w)) for t, w in kept.items())
    wanted = {title: kept[title] for title in FLEXIBLE}
    kept |= {title: min(kept[title], least) for title, least in FLEXIBLE.items()}
    # Room that is left: for a few words of why, then for names, then for the rest of why.
    for title, most in ((RANK, WHY_CELLS), (MODEL, wanted[MODEL]), (RANK, wanted[RANK])):
        more = max(0, min(left, min(most, wanted[title]) - kept[title]))
        kept[title], left = kept[title] + more, left - more
    return kept


def _heading(title: str) -> str:
    """Return a title on two lines."""
    return title.replace(" ", "\n", 1)


def _cut(text: str, cells: int) -> str:
    """Return a text cut in its middle: names differ most at their ends."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= cells:
        return text
    tail = max(0, (cells - 1) // 2)
    end = text[len(text) - tail :]
    while cell_len(end) > tail:
        end = end[1:]
    return f"{set_cell_size(text, cells - 1 - cell_len(end))}…{end}"
