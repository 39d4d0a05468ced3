"""``modelhostd fsck --rebuild``: the registry made again from the manifests."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.adapters.database import FILE_NAME
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    ArtifactState,
    Kind,
    Model,
    Source,
)
from tests.adapters.database_support import edit_directly
from tests.adapters.fsck_support import (
    contents,
    kinds,
    model,
    put_files,
    run,
    sound_home,
    stored_models,
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home with one sound model of two versions."""
    return sound_home(tmp_path / "home")


def break_database(home: Path, how: str) -> None:
    """Damage a database, or take it away."""
    path = home / FILE_NAME
    if how == "gone":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(b"no database " * 1000)
    elif how == "row":
        edit_directly(path, "UPDATE resources SET json = '{}'")
    else:
        data = bytearray(path.read_bytes())
        data[4096:] = b"\xff" * (len(data) - 4096)
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["gone", "garbage", "pages", "row"])
def test_a_lost_registry_is_made_again_from_the_manifests(home: Path, how: str) -> None:
    """Models come back as they were, with their artifacts; the old database is kept, moved aside."""
    before = stored_models(home)["minilm"]
    old_store = DatabaseFile(home / FILE_NAME)
    store_id = old_store.open().store_id
    old_store.close()
    break_database(home, how)
    broken = (home / FILE_NAME).read_bytes() if how != "gone" else None

    code, report = run(home)
    assert (code, kinds(report)) == (1, ["database_broken"])
    assert "--rebuild" in report["findings"][0]["message"]
    code, report = run(home, "--repair")
    assert code == 1
    assert (home / "models" / "minilm" / "2" / "manifest.json").exists()

    code, report = run(home, "--rebuild")
    assert (code, report["rebuilt_models"]) == (0, 1)
    if broken is not None:
        assert Path(report["moved_aside"]).read_bytes() == broken
    file = DatabaseFile(home / FILE_NAME)
    stored = file.open()
    (event,) = file.read_events(0, 10)
    file.close()
    again = stored.resources[Kind.MODEL]["minilm"]
    assert isinstance(again, Model)
    assert replace(again, update_time=before.update_time) == before
    assert stored.store_id not in ("", store_id)
    assert (event.reason, event.created, event.resource) == ("REBUILT", True, again)
    assert run(home, "--deep")[0] == 0


def test_the_log_of_a_broken_database_moves_with_it(home: Path) -> None:
    """A write-ahead log that was left belongs to the old database, not to the new one."""
    log = home / (FILE_NAME + "-wal")
    break_database(home, "garbage")
    log.write_bytes(b"left by a crash")
    _, report = run(home, "--rebuild")
    aside = Path(report["moved_aside"])
    assert aside.with_name(aside.name + "-wal").read_bytes() == b"left by a crash"
    assert not log.exists() or not log.read_bytes()
    break_database(home, "garbage")
    _, report = run(home, "--rebuild")
    assert Path(report["moved_aside"]) != aside
    assert aside.exists()


def test_a_sound_database_is_not_rebuilt(home: Path) -> None:
    """--rebuild on a sound home changes nothing: settings and history stay."""
    before = contents(home)
    code, report = run(home, "--rebuild")
    assert (code, report["rebuilt_models"]) == (0, None)
    assert contents(home) == before


@pytest.mark.parametrize("version", ["99", "0"])
def test_a_database_of_another_version_is_not_rebuilt(home: Path, version: str) -> None:
    """A newer one is sound to somebody else: nothing of it is moved or changed."""
    edit_directly(
        home / FILE_NAME, f"UPDATE meta SET value = '{version}' WHERE key = 'schema_version'"
    )
    before = contents(home)
    code, report = run(home, *(["--rebuild", "--repair"] if version == "99" else []))
    assert (code, contents(home)) == (1, before)
    assert kinds(report) == ["database_version" if version == "99" else "database_broken"]


def test_damaged_files_come_back_as_failed(home: Path) -> None:
    """A rebuild claims only what is on disk; a broken manifest is told of and left where it is."""
    put_files(home, model("other", 1), 1, {"config.json": b"{ }"})
    (home / "models" / "other" / "1" / "manifest.json").write_text("{")
    weights = home / "models" / "minilm" / "2" / "files" / "sub" / "model.safetensors"
    weights.unlink()
    weights.write_bytes(b"short")
    break_database(home, "gone")
    code, report = run(home, "--rebuild")
    assert (code, kinds(report)) == (1, ["broken_manifest", "wrong_size"])
    states = [a.state for a in stored_models(home)["minilm"].artifacts]
    assert states == [ArtifactState.AVAILABLE, ArtifactState.FAILED]
    assert list(stored_models(home)) == ["minilm"]
    assert (home / "models" / "other" / "1" / "manifest.json").exists()


def test_a_manifest_of_unknown_content_still_gives_its_model(home: Path) -> None:
    """An entry that cannot be read costs names and configuration, not the model."""
    path = home / "models" / "minilm" / "2" / "manifest.json"
    document = json.loads(path.read_text())
    document["entry"] = {"source": 5, "labels": "no"}
    path.write_text(json.dumps(document))
    break_database(home, "gone")
    assert run(home, "--rebuild")[0] == 0
    again = stored_models(home)["minilm"]
    assert again.source == Source("hf://org/minilm", "main", ("*.json",))
    assert again.task == "feature-extraction"
    assert [a.version for a in again.artifacts] == [1, 2]
    assert len(again.uid) == 36


def test_an_uploaded_model_of_unknown_content_comes_back_without_a_source(home: Path) -> None:
    """Its artifact says that it was uploaded; there is nothing to download it from."""
    path = home / "models" / "minilm" / "2" / "manifest.json"
    document = json.loads(path.read_text())
    document["entry"] = {"source": 5}
    document["source"] = {
        "uri": "upload://", "revision": "", "allow_patterns": [], "ignore_patterns": []
    }  # fmt: skip
    path.write_text(json.dumps(document))
    break_database(home, "gone")
    assert run(home, "--rebuild")[0] == 0
    again = stored_models(home)["minilm"]
    assert again.source == Source("")
    assert again.artifacts[-1].source == Source("upload://")


def test_a_rebuild_that_fails_leaves_everything(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the new database cannot be written the old one is where it was, and a retry works."""
    break_database(home, "garbage")
    broken = (home / FILE_NAME).read_bytes()

    def full(*_: object) -> None:
        raise ModelhostError(Reason.INSUFFICIENT_DISK_SPACE, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(DatabaseFile, "commit", full)
        assert run(home, "--rebuild") == (1, None)
    assert (home / FILE_NAME).read_bytes() == broken
    assert run(home, "--rebuild")[0] == 0


@pytest.mark.parametrize(("told", "task"), [("", "text-generation"), ("robotics", "other")])
def test_a_task_that_the_files_told_comes_back(home: Path, told: str, task: str) -> None:
    """Where the source said nothing of it, it is that of the newest config.json again, as after the download."""
    config = json.dumps({"architectures": ["GPT2LMHeadModel"], "vocab_size": 9}).encode()
    owner = replace(model("folder", 1), task="", source=Source("file:///folder"))
    path = put_files(home, owner, 1, {"config.json": config}) / "manifest.json"
    document = json.loads(path.read_text())
    document["source_task"] = told
    path.write_text(json.dumps(document))
    break_database(home, "gone")
    assert run(home, "--rebuild")[0] == 0
    assert stored_models(home)["folder"].task == task
