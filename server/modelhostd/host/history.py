"""How long the event log remembers."""

from modelhostd.core.errors import ModelhostError
from modelhostd.core.values import dataclass
from modelhostd.ports import Database

COMPACT_EVERY = 1000
"""Events between two looks at the log's length."""
COMPACT_STEP = 2000
"""Events dropped at once: more would hold up the database's thread."""


@dataclass(slots=True)
class History:
    """Bounds of the event log; what is beyond either goes, up to 2,000 events later than it could."""

    count: int = 100_000
    age_s: float = 7 * 86_400.0
    ring: int = 4096


class Compaction:
    """Decides, every 1,000 events, which of the oldest go."""

    def __init__(self, history: History, last_sequence: int) -> None:
        self._history = history
        self._look_at = last_sequence + COMPACT_EVERY

    async def before(self, database: Database, first: int, last: int, now: float) -> int:
        """Return the sequence before which events are dropped, or 0, for a log of first to last."""
        if last < self._look_at:
            return 0
        step = first + COMPACT_STEP
        before = min(last - self._history.count + 1, step)
        if before < step <= last and await self._too_old(database, step - 1, now):
            before = step
        # A step that was not enough is soon followed by the next one.
        self._look_at = last + (COMPACT_EVERY // 10 if before == step else COMPACT_EVERY)
        return before if before > first else 0

    async def _too_old(self, database: Database, sequence: int, now: float) -> bool:
        try:
            found = await database.read_events(sequence, 1)
        except ModelhostError:
            # Looked at again in a thousand events; the commit that waits here says what is wrong.
            return False
        return bool(found) and found[0].time < now - self._history.age_s
