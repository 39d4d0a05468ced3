"""The import contracts of pyproject.toml find what they are for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Contract -> file, and the line planted in it. Whether the tree itself keeps them: `make check`.
PLANTED = {
    "layers": ("modelhostd/adapters/planted.py", "import modelhostd.api"),
    "composition": ("modelhostd/api/planted.py", "def f(): import modelhostd.adapters"),
    "torch": ("modelhostd/api/planted.py", "from torch.nn import Module"),
    "core": ("modelhostd/core/planted.py", "def f(): from time import monotonic"),
    "client": ("modelhost/planted.py", "import modelhostd.core.errors"),
    "contract": ("modelhostd/api/planted.py", "import modelhost.planted_client"),
    "worker": ("modelhostd/worker/planted.py", "import modelhostd.api"),
}


def lint(tree: Path, contract: str) -> subprocess.CompletedProcess[str]:
    """Run one contract over a copy of the two packages."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--contract", contract],
        cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)},
        check=False, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("contract", PLANTED)
def test_a_contract_finds_a_planted_import(contract: str, tmp_path: Path) -> None:
    """Each contract is broken by the import that it forbids, wherever in a file it stands."""
    leave = shutil.ignore_patterns("__pycache__", ".cache")
    for root in ("client", "server"):
        shutil.copytree(ROOT / root, tmp_path, dirs_exist_ok=True, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path, line = PLANTED[contract]
    (tmp_path / "modelhost" / "planted_client.py").touch()
    (tmp_path / path).write_text(line + "\n")
    done = lint(tmp_path, contract)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout, done.stdout + done.stderr
    assert ".planted" in done.stdout
