"""``modelhostd fsck``: registry against disk while no daemon runs, the safe repairs, and the rebuild.

It holds the home's lock for as long as it works, so it never opens the database beside a daemon. Exit
codes: 0 nothing is left to repair, 1 findings are, 2 usage, 75 the home is in use, 78 configuration.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from modelhostd.adapters import database_check, rebuild
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.database import FILE_NAME
from modelhostd.adapters.database_check import DatabaseReport
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.lock import HomeHeldError, HomeLock
from modelhostd.adapters.trees import TreeStore
from modelhostd.config_load import load_home
from modelhostd.config_values import ConfigError
from modelhostd.core import registry
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.findings import FindingKind
from modelhostd.core.resources import ArtifactState, Event, Kind, Model, StoredError
from modelhostd.core.tasks import task_of_config
from modelhostd.core.values import dataclass
from modelhostd.ports import Batch, Change, StorageFinding

EXIT_CLEAN = 0
EXIT_FINDINGS = 1

_UNUSABLE = frozenset(
    {
        FindingKind.MISSING_TREE,
        FindingKind.BROKEN_MANIFEST,
        FindingKind.MISSING_FILE,
        FindingKind.WRONG_SIZE,
        FindingKind.CORRUPT_FILE,
    }
)
"""What makes an artifact useless until it is downloaded again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What fsck found and did. ``rebuilt`` is the number of models, None if nothing was rebuilt."""

    home: str
    findings: Sequence[StorageFinding]
    rebuilt: int | None = None
    moved_aside: str = ""

    @property
    def clean(self) -> bool:
        """Whether nothing is left to repair."""
        return all(finding.repaired for finding in self.findings)


def main(given: Sequence[str], out: TextIO | None = None) -> int:
    """Run the command with its arguments and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="modelhostd fsck",
        allow_abbrev=False,
        description="Check a home that no daemon uses: its database against its files.",
        epilog="exit codes: 0 nothing is left to repair, 1 findings, 2 usage, 75 the home is in use",
    )
    parser.add_argument("--home", metavar="PATH", help="the home to check")
    parser.add_argument(
        "--config", metavar="FILE", help="the TOML file that says where the home is"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--deep", action="store_true", help="hash every file, read every event")
    parser.add_argument("--repair", action="store_true", help="make the repairs that lose nothing")
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="move a broken database aside and make a new one from the models' manifests",
    )
    parsed = parser.parse_args(list(given))
    out = sys.stdout if out is None else out
    try:
        home = load_home(parsed)
        outcome = run_fsck(
            home, deep=parsed.deep, repair=parsed.repair, rebuild_lost=parsed.rebuild
        )
    except (ConfigError, HomeHeldError) as error:
        sys.stderr.write(f"modelhostd fsck: {error}\n")
        return error.exit_code
    except ModelhostError as error:
        sys.stderr.write(f"modelhostd fsck: {error.message} [{error.reason}]\n")
        return EXIT_FINDINGS
    _print(outcome, out, as_json=parsed.json)
    return EXIT_CLEAN if outcome.clean else EXIT_FINDINGS


def run_fsck(
    home: Path, *, deep: bool = False, repair: bool = False, rebuild_lost: bool = False
) -> Outcome:
    """Check ``home`` and do what is asked. Raises HomeHeldError, or ModelhostError where it cannot."""
    if not home.is_dir():
        raise ModelhostError(
            Reason.STORAGE_ERROR,
            f"{home} is no directory; --home says where the state is",
            {"path": str(home), "cause": "no directory"},
        )
    with HomeLock(home):
        store = BlobStore(StoreConfig(home=home))
        try:
            check = _Fsck(home, FileStore(store, TreeStore(store)), deep=deep, repair=repair)
            return asyncio.run(check.run(rebuild_lost=rebuild_lost))
        except OSError as error:
            raise ModelhostError(
                Reason.STORAGE_ERROR,
                f"{home} cannot be checked: {error}",
                {"path": str(home), "cause": str(error)},
            ) from error
        finally:
            store.close()


class _Fsck:
    def __init__(self, home: Path, files: FileStore, *, deep: bool, repair: bool) -> None:
        self._home = home
        self._path = home / FILE_NAME
        self._files = files
        self._deep = deep
        self._repair = repair

    async def run(self, *, rebuild_lost: bool) -> Outcome:
        report = database_check.look(self._path, deep=self._deep)
        lost = any(f.kind == FindingKind.DATABASE_BROKEN for f in report.findings)
        if lost and rebuild_lost:
            return await self._rebuild()
        if report.stored is None:
            # Without a registry every model would look like a stray.
            return Outcome(str(self._home), report.findings)
        models = _models(report)
        if not self._repair:
            found = await self._check(models)
            return Outcome(str(self._home), [*report.findings, *found])
        return Outcome(str(self._home), await self._repaired(report, models))

    async def _check(self, models: Sequence[Model]) -> Sequence[StorageFinding]:
        return await self._files.check(_expected(models), deep=self._deep, repair=self._repair)

    async def _repaired(
        self, report: DatabaseReport, models: Sequence[Model]
    ) -> Sequence[StorageFinding]:
        """Repair the disk, then let the registry say what is left, then look at the disk again."""
        await self._files.recover()
        first = await self._check(models)
        failed = _failures(first)
        changed = [model for model in (_without(m, failed) for m in models) if model is not None]
        self._write(report, changed)
        done = [replace(finding, repaired=True) for finding in report.findings]
        done += [_told(finding, failed) for finding in first]
        if changed:
            by_id = {model.id: model for model in (*models, *changed)}
            done += [f for f in await self._check(list(by_id.values())) if f not in first]
        return done

    def _write(self, report: DatabaseReport, changed: Sequence[Model]) -> None:
        """Commit models whose artifacts are FAILED now, and let the log begin where it is whole."""
        if not changed and not report.whole_from:
            return
        file = DatabaseFile(self._path)
        last, now = file.open().last_sequence, time.time()
        try:
            events = tuple(
                Event(sequence, now, Kind.MODEL, model.id, model, "FILES_LOST")
                for sequence, model in enumerate(changed, start=last + 1)
            )
            rows = tuple(Change(Kind.MODEL, model.id, model) for model in changed)
            file.commit(Batch(rows, events, compact_before=report.whole_from))
        finally:
            file.close()

    async def _rebuild(self) -> Outcome:
        await self._files.recover()
        manifests, broken = await self._files.read_manifests()
        expected: dict[str, list[int]] = {}
        for manifest in manifests:
            expected.setdefault(manifest.model, []).append(manifest.version)
        found = await self._files.check(expected, deep=self._deep, repair=self._repair)
        failed = _failures(found)
        config_tasks = {
            (m.model, m.version): task_of_config(await self._files.read_config(m.model, m.version))
            for m in manifests
        }
        now = time.time()
        models = rebuild.models_of(manifests, failed, config_tasks, now)
        aside = rebuild.write(self._path, models, now)
        return Outcome(
            str(self._home),
            [
                *(replace(finding, repaired=self._repair) for finding in broken),
                # A tree whose manifest is broken is told of above, with the reason.
                *(_told(f, failed) for f in found if f.kind != FindingKind.STRAY_TREE),
            ],
            rebuilt=len(models),
            moved_aside=str(aside) if aside else "",
        )


def _models(report: DatabaseReport) -> Sequence[Model]:
    stored = report.stored.resources.get(Kind.MODEL, {}) if report.stored else {}
    return [model for model in stored.values() if isinstance(model, Model)]


def _expected(models: Sequence[Model]) -> Mapping[str, Sequence[int]]:
    return {
        model.id: [a.version for a in model.artifacts if a.state is ArtifactState.AVAILABLE]
        for model in models
    }


def _artifact_of(finding: StorageFinding) -> tuple[str, int]:
    """Return the (model, version) that a finding is of: its name is ``model/version[/path]``."""
    model, _, rest = finding.name.partition("/")
    version = rest.partition("/")[0]
    return model, int(version) if version.isascii() and version.isdigit() else 0


def _failures(findings: Sequence[StorageFinding]) -> Mapping[tuple[str, int], StoredError]:
    """Return the artifacts that must be downloaded again, with why."""
    return {
        _artifact_of(finding): StoredError(
            Reason.STORAGE_ERROR.value,
            finding.message,
            {"path": finding.name, "cause": str(finding.kind)},
        )
        for finding in findings
        if finding.kind in _UNUSABLE and not finding.repaired
    }


def _told(finding: StorageFinding, failed: Mapping[tuple[str, int], StoredError]) -> StorageFinding:
    """Return a finding as repaired where the registry now says what is on disk."""
    told = finding.kind in _UNUSABLE and _artifact_of(finding) in failed
    return replace(finding, repaired=True) if told else finding


def _without(model: Model, failed: Mapping[tuple[str, int], StoredError]) -> Model | None:
    """Return the model with its failed artifacts marked so, None if it has none."""
    changed = model
    for artifact in model.artifacts:
        error = failed.get((model.id, artifact.version))
        if error is not None and artifact.state is ArtifactState.AVAILABLE:
            changed = registry.failed_artifact(changed, artifact.version, error, quarantined=False)
    return changed if changed != model else None


def _print(outcome: Outcome, out: TextIO, *, as_json: bool) -> None:
    if as_json:
        document = {
            "home": outcome.home,
            "clean": outcome.clean,
            "findings": [asdict(finding) for finding in outcome.findings],
            "rebuilt_models": outcome.rebuilt,
            "moved_aside": outcome.moved_aside,
        }
        out.write(json.dumps(document, indent=1) + os.linesep)
        return
    for finding in outcome.findings:
        state = " (--repair mends it)" if finding.repairable else ""
        state = " (repaired)" if finding.repaired else state
        out.write(f"{finding.kind}: {finding.message}{state}\n")
    if outcome.moved_aside:
        out.write(f"the broken database is now {outcome.moved_aside}\n")
    if outcome.rebuilt is not None:
        out.write(f"the registry was rebuilt: {outcome.rebuilt} models\n")
    left = sum(not finding.repaired for finding in outcome.findings)
    out.write(f"{outcome.home}: {f'{left} findings' if left else 'clean'}\n")
