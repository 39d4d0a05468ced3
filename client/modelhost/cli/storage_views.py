"""How the disk's use and its quarantine look as tables and as names with values."""

from modelhost._names import short
from modelhost._text import show_bytes
from modelhost.cli.output import Column, counted
from modelhost.cli.views import Pairs, ago, size, when, word
from modelhost.v1 import storage_pb2

USE_COLUMNS: list[Column[storage_pb2.Storage.ModelUse]] = [
    Column("MODEL", lambda u: short(u.model)),
    Column("SIZE", lambda u: u.size_bytes, size, right=True),
    Column("OWN", lambda u: u.own_bytes, size, right=True),
    Column("LAST USE", lambda u: when(u.last_use_time), ago),
    Column("KEPT BY", lambda u: u.kept_by.lower(), word),
]

QUARANTINE_COLUMNS: list[Column[storage_pb2.QuarantinedFile]] = [
    Column("FILE", lambda q: short(q.name)),
    Column("MODEL", lambda q: short(q.model), word),
    Column("PATH", lambda q: q.path),
    Column("SIZE", lambda q: q.size_bytes, size, right=True),
    Column("SINCE", lambda q: when(q.create_time), ago),
    Column("WHY", lambda q: q.message, prose=True),
]


def storage_pairs(used: storage_pb2.Storage) -> Pairs:
    """Return what ``storage`` tells of the disk."""
    yield "home", used.home
    files = f"{show_bytes(used.blob_bytes)} in {counted(used.blob_count, 'file')}"
    if used.shared_bytes:
        files += f", {show_bytes(used.shared_bytes)} of it shared between models"
    yield "files", files
    yield "staging", show_bytes(used.staging_bytes)
    yield "quarantine", show_bytes(used.quarantine_bytes)
    yield "reclaimable", show_bytes(used.reclaimable_bytes)
    yield "free", f"{show_bytes(used.free_bytes)} of {show_bytes(used.total_bytes)}"
    yield "budget", show_bytes(used.budget_bytes) if used.budget_bytes else "none"
    room = show_bytes(used.available_bytes)
    if used.reserved_bytes:
        room += f", {show_bytes(used.reserved_bytes)} promised to others already"
    yield "room for downloads", room
    asked = used.hit_count + used.miss_count
    if asked:
        share = f"{100 * used.hit_count // asked} % of {counted(asked, 'need')}"
        yield "found on disk", f"{share}; {show_bytes(used.fetched_bytes)} fetched"
