"""``modelhostd fsck``: what it finds and what it repairs."""

import io
import os
import sqlite3
from pathlib import Path

import pytest

from modelhostd.adapters import fsck
from modelhostd.adapters.database import FILE_NAME
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.adapters.lock import HomeLock
from modelhostd.core.resources import ArtifactState, Kind, Settings
from modelhostd.ports import Batch, Change
from tests.adapters.database_support import edit_directly
from tests.adapters.fsck_support import (
    contents,
    kinds,
    model,
    put_files,
    register,
    run,
    sound_home,
    stored_models,
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home with one sound model of two versions."""
    return sound_home(tmp_path / "home")


def test_a_sound_home_is_clean_and_untouched(home: Path) -> None:
    """Exit 0, no finding, and not a byte is changed, by a deep check neither."""
    before = contents(home)
    assert run(home) == (0, {"home": str(home), "clean": True, "findings": [],
                             "rebuilt_models": None, "moved_aside": ""})  # fmt: skip
    code, _ = run(home, "--deep")
    assert code == 0
    assert contents(home) == before


def test_an_empty_home_is_clean(tmp_path: Path) -> None:
    """A home in which no daemon ever ran has nothing wrong, and no database is made in it."""
    assert run(tmp_path)[0] == 0
    assert not (tmp_path / FILE_NAME).exists()


def test_a_home_that_is_held_is_left_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a running daemon nothing is opened: exit 75 with the holder's process id."""
    (home / FILE_NAME).chmod(0)
    with HomeLock(home):
        assert run(home, "--repair", "--rebuild") == (75, None)
    assert str(os.getpid()) in capsys.readouterr().err


def test_a_home_that_is_not_there_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typo in --home is an error, not an empty home."""
    assert run(tmp_path / "no")[0] == 1
    assert "--home" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_usage_and_configuration_have_their_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown flag is 2, a bad configuration 78."""
    with pytest.raises(SystemExit) as caught:
        fsck.main(["--nonsense"])
    assert caught.value.code == 2
    bad = tmp_path / "x.toml"
    bad.write_text("hoem = '/x'")
    assert fsck.main(["--config", str(bad)]) == 78
    assert "did you mean 'home'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "kind"),
    [("tree", "missing_tree"), ("manifest", "broken_manifest"), ("size", "wrong_size"),
     ("file", "missing_file"), ("bytes", "corrupt_file")],
)  # fmt: skip
def test_a_damaged_artifact_is_found_and_no_longer_claimed(
    home: Path, damage: str, kind: str
) -> None:
    """A check names it; a repair makes the registry say FAILED; then the home is clean."""
    tree = home / "models" / "minilm" / "2"
    weights = tree / "files" / "sub" / "model.safetensors"
    if damage == "tree":
        tree.rename(home / "gone")
    elif damage == "manifest":
        (tree / "manifest.json").write_text("{")
    else:
        # A copy, so that the other version's link keeps the right bytes.
        content = weights.read_bytes()
        weights.unlink()
        if damage == "file":
            for blob in (home / "blobs").rglob("*"):
                if blob.is_file() and blob.read_bytes() == content:
                    blob.unlink()
            put = home / "models" / "minilm" / "1"
            put.rename(home / "gone-too")
        else:
            weights.write_bytes(content[:-1] if damage == "size" else content[::-1])
    before = contents(home)
    code, report = run(home, "--deep")
    assert code == 1
    assert kind in kinds(report)
    assert contents(home) == before

    code, report = run(home, "--deep", "--repair")
    assert code == 0, report
    assert report["clean"]
    newest = stored_models(home)["minilm"].artifacts[-1]
    assert newest.state is ArtifactState.FAILED
    assert newest.error is not None
    assert newest.error.reason == "STORAGE_ERROR"
    assert "download" in newest.error.message
    assert run(home, "--deep")[0] == 0


def test_a_repair_is_an_event(home: Path) -> None:
    """What a repair changes in the registry stands in the log, with the next number."""
    (home / "models" / "minilm" / "1").rename(home / "gone")
    run(home, "--repair")
    file = DatabaseFile(home / FILE_NAME)
    assert file.open().last_sequence == 2
    (event,) = file.read_events(2, 10)
    file.close()
    assert (event.kind, event.key, event.reason) == (Kind.MODEL, "minilm", "FILES_LOST")
    assert event.resource == stored_models(home)["minilm"]


def test_what_nobody_owns_goes_out_of_the_way(home: Path) -> None:
    """Unknown trees go to quarantine, blobs of nobody go; nothing that a model needs does."""
    put_files(home, model("stranger", 1), 1, {"config.json": b"other"})
    stray = home / "blobs" / "sha256" / "ab" / ("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"x")
    code, report = run(home)
    assert (code, kinds(report)) == (1, ["stray_blob", "stray_tree"])
    code, report = run(home, "--repair")
    assert (code, report["clean"]) == (0, True)
    assert not stray.exists()
    assert not (home / "models" / "stranger").exists()
    assert list((home / "quarantine").rglob("config.json"))
    assert run(home, "--deep") == run(home)
    assert run(home)[0] == 0


def test_a_gap_in_the_log_is_found_and_ends_before_it_begins(home: Path) -> None:
    """A missing number is a finding; after the repair the log begins behind it, without a gap."""
    register(home, *(model("minilm", 1, 2) for _ in range(9)))
    edit_directly(home / FILE_NAME, "DELETE FROM events WHERE sequence = 5")
    code, report = run(home)
    assert (code, kinds(report)) == (1, ["sequence_gap"])
    assert "5" in report["findings"][0]["name"]
    assert run(home, "--repair")[0] == 0
    file = DatabaseFile(home / FILE_NAME)
    stored = file.open()
    assert (stored.first_sequence, stored.last_sequence) == (6, 10)
    file.close()
    assert run(home)[0] == 0


def test_an_event_that_cannot_be_read_is_found_by_a_deep_check(home: Path) -> None:
    """Every event is read with --deep; the repair lets the log begin behind the broken one."""
    register(home, *(model("minilm", 1, 2) for _ in range(9)))
    edit_directly(home / FILE_NAME, "UPDATE events SET resource = '[' WHERE sequence IN (3, 4)")
    assert run(home)[0] == 0
    code, report = run(home, "--deep")
    assert (code, kinds(report)) == (1, ["broken_event", "broken_event"])
    assert run(home, "--deep", "--repair")[0] == 0
    assert run(home, "--deep")[0] == 0


def test_settings_survive_a_repair(home: Path) -> None:
    """A repair touches only what it repairs."""
    file = DatabaseFile(home / FILE_NAME)
    file.open()
    file.commit(Batch((Change(Kind.SETTINGS, "host", Settings(queue_limit=7)),), ()))
    file.close()
    (home / "models" / "minilm" / "2").rename(home / "gone")
    assert run(home, "--repair")[0] == 0
    again = DatabaseFile(home / FILE_NAME)
    assert again.open().resources[Kind.SETTINGS]["host"] == Settings(queue_limit=7)
    again.close()
    connection = sqlite3.connect(home / FILE_NAME)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_what_is_printed_for_people(home: Path) -> None:
    """One line a finding, and one that sums up."""
    (home / "models" / "minilm" / "2").rename(home / "gone")
    out = io.StringIO()
    assert fsck.main(["--home", str(home)], out) == 1
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("missing_tree: minilm/2 is not on disk")
    assert lines[-1] == f"{home}: 1 findings"
    out = io.StringIO()
    assert fsck.main(["--home", str(home), "--repair"], out) == 0
    assert "(repaired)" in out.getvalue()
    assert out.getvalue().splitlines()[-1] == f"{home}: clean"
