"""Homes with models, for the tests of fsck."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modelhostd.adapters import fsck
from modelhostd.adapters.database import FILE_NAME
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core import manifest as manifests
from modelhostd.core import registry
from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Event,
    Kind,
    Model,
    ModelConfig,
    ModelFile,
    Source,
)
from modelhostd.ports import Batch, Change

FILES = {"config.json": b"{}", "sub/model.safetensors": b"weights" * 100}


def model(name: str, *versions: int) -> Model:
    """Return a model with available artifacts."""
    source = Source(f"hf://org/{name}", "main", ("*.json",))
    return Model(
        id=name,
        uid=f"uid-of-{name}",
        source=source,
        create_time=100.0,
        update_time=200.0,
        display_name=f"The {name}",
        labels={"team": "search"},
        licence="mit",
        task="feature-extraction",
        config=ModelConfig(keep_alive_s=5.0, backend_options={"pooling": "mean"}),
        artifacts=tuple(
            Artifact(
                version,
                ArtifactState.AVAILABLE,
                revision=f"commit{version}",
                size_bytes=sum(map(len, FILES.values())),
                file_count=len(FILES),
                predicted_bytes=7,
                create_time=150.0,
                available_time=150.0,
                source=source,
            )
            for version in versions
        ),
        last_version=max(versions, default=0),
    )


def put_files(home: Path, owner: Model, version: int, files: Mapping[str, bytes] = FILES) -> Path:
    """Lay an artifact on disk as a download does: blobs, links and the manifest."""
    tree = home / "models" / owner.id / str(version)
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        blob = home / "blobs" / "sha256" / digest[:2] / digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(content)
        path = tree / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(blob, path)
    entry = {"id": owner.id, "uid": owner.uid, "create_time": owner.create_time,
             **asdict(registry.spec_of(owner))}  # fmt: skip
    document = manifests.Manifest(
        model=owner.id,
        version=version,
        source=owner.source,
        revision=f"commit{version}",
        files=tuple(
            ModelFile(name, len(content), hashlib.sha256(content).hexdigest())
            for name, content in files.items()
        ),
        predicted_bytes=7,
        create_time=150.0,
        source_task="sentence-similarity",
        entry=json.loads(json.dumps(entry)),
    )
    (tree / "manifest.json").write_bytes(manifests.encode(document))
    return tree


def register(home: Path, *models: Model) -> None:
    """Write models and one event each into the home's database."""
    file = DatabaseFile(home / FILE_NAME, fresh=True)
    last = file.open().last_sequence
    for sequence, one in enumerate(models, start=last + 1):
        event = Event(sequence, 1.0, Kind.MODEL, one.id, one, "CREATED", created=True)
        file.commit(Batch((Change(Kind.MODEL, one.id, one),), (event,)))
    file.close()


def sound_home(home: Path) -> Path:
    """Make a home with one sound model of two versions."""
    home.mkdir(mode=0o700)
    minilm = model("minilm", 1, 2)
    register(home, minilm)
    for version in (1, 2):
        put_files(home, minilm, version)
    return home


def run(home: Path, *arguments: str) -> tuple[int, Any]:
    """Run the command; return its exit code and what it printed as JSON."""
    out = io.StringIO()
    code = fsck.main(["--home", str(home), "--json", *arguments], out)
    return code, json.loads(out.getvalue()) if out.getvalue() else None


def kinds(report: Any) -> list[str]:
    """Return the kinds of the findings."""
    return sorted(finding["kind"] for finding in report["findings"])


def contents(home: Path) -> dict[str, bytes]:
    """Return every file below the home, but the lock's."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def stored_models(home: Path) -> Mapping[str, Model]:
    """Return what the registry says."""
    file = DatabaseFile(home / FILE_NAME)
    models = file.open().resources[Kind.MODEL]
    file.close()
    return models  # type: ignore[return-value]
