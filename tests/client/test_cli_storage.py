"""How `modelhost storage` and `prune` tell of the disk."""

import contextlib
import io
from collections.abc import Callable

from click.testing import Result
from rich.console import Console

from modelhost._bars import bars
from modelhost._progress import Lines, phase_word, without_room
from modelhost.v1 import operations_pb2, storage_pb2
from tests.client.double import Double

Run = Callable[..., Result]


def test_storage_shows_shares_room_and_hits(double: Double, run: Run) -> None:
    """The budget, what is promised, what is shared, the hit rate; per model its own bytes and what keeps it."""
    used = storage_pb2.Storage(
        home="/srv/mh", blob_bytes=3 << 20, blob_count=5, shared_bytes=1 << 20,
        budget_bytes=8 << 20, available_bytes=4 << 20, reserved_bytes=1 << 20,
        hit_count=3, miss_count=1, fetched_bytes=2 << 20,
        models=[
            {"model": "models/mini", "size_bytes": 2 << 20, "own_bytes": 1 << 20, "kept_by": "PINNED"},
            {"model": "models/old", "size_bytes": 1 << 20, "last_use_time": {"seconds": 1577836800}},
        ],
    )  # fmt: skip
    double.on("GetStorage", used)
    lines = run("--format", "table", "storage").output.splitlines()
    shown = " ".join(" ".join(lines).split())
    for text in (
        "3.0 MiB in 5 files, 1.0 MiB of it shared between models",
        "budget 8.0 MiB",
        "room for downloads 4.0 MiB, 1.0 MiB promised to others already",
        "found on disk 75 % of 4 needs; 2.0 MiB fetched",
    ):
        assert text in shown
    (mini,) = (line.split() for line in lines if line.startswith("mini"))
    assert mini[-1] == "pinned"
    (old,) = (line for line in lines if line.startswith("old"))
    assert "ago" in old


def test_storage_without_budget_says_so(told: Double, run: Run) -> None:
    """And nothing of hits before anything was needed."""
    shown = run("storage").output
    assert "none" in shown
    assert "found on disk" not in shown


def test_a_trial_of_pruning_says_that_it_is_one(double: Double, run: Run) -> None:
    """What would be free is not free."""
    for dry_run, words in ((True, "would be free"), (False, "are free again")):
        pruned = operations_pb2.PruneResult(freed_bytes=1536, dry_run=dry_run)
        done = operations_pb2.Operation(
            name="operations/1", state=operations_pb2.Operation.SUCCEEDED, prune_result=pruned
        )
        double.on("PruneStorage", done)
        assert f"1.5 KiB of disk {words}" in run("prune", "--dry-run").output


def test_a_download_without_room_says_what_it_waits_for() -> None:
    """Paused by somebody is another thing."""
    operation = operations_pb2.Operation(state=operations_pb2.Operation.PAUSED)
    assert phase_word(operation) == "paused"
    assert without_room(operation) == ""
    operation.progress.retry.reason = "INSUFFICIENT_DISK_SPACE"
    operation.progress.retry.message = "5 bytes are needed and 3 are free: free 2"
    assert phase_word(operation) == "waits for room on disk"
    for terminal in (False, True):
        shown_on = io.StringIO()
        console = Console(file=shown_on, force_terminal=terminal, width=200)
        with (
            bars(shown_on, console) if terminal else contextlib.nullcontext(Lines(shown_on)) as tell
        ):
            tell(operation)
            tell(operation)
        assert shown_on.getvalue().count("5 bytes are needed and 3 are free: free 2") == 1
