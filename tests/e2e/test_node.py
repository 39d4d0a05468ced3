"""Another language: the Node example does the main job against the real daemon, in TypeScript as well."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from bench.models import minilm_dir
from tests.e2e.process import Daemon

pytestmark = pytest.mark.timeout(720)
"""A worker imports a library for seconds, which on a swamped machine is more than a minute."""

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "node"
NPM_S = 120.0
SOURCE = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def node() -> str:
    """Node, with the example's packages installed; skips where either cannot be had."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        pytest.skip("Node is not installed")
    # npm writes this list last: without it what is there is a part.
    if not (EXAMPLE / "node_modules" / ".package-lock.json").exists():
        try:
            done = subprocess.run(
                [npm, "install", "--no-audit", "--no-fund", "--silent"],
                cwd=EXAMPLE,
                capture_output=True,
                text=True,
                timeout=NPM_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm does not install the example's packages within {NPM_S:g} s")
        if done.returncode:
            pytest.skip(f"npm cannot install the example's packages: {done.stderr[-200:]}")
    return found


@pytest.fixture(scope="module")
def served() -> Iterator[Daemon]:
    """A daemon with a hub that serves the real model."""
    repo = Repo.from_folder(minilm_dir(), pipeline_tag="sentence-similarity")
    # Its path leaves room for a socket's name.
    root = Path(tempfile.mkdtemp(prefix="mh-"))
    try:
        with (
            LoopbackHub({SOURCE: repo}) as hub,
            Daemon(root, environment={"HF_ENDPOINT": hub.endpoint}) as running,
        ):
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_node_does_the_main_job(node: str, served: Daemon) -> None:
    """Node registers, downloads with progress, infers, reads a typed error and resumes its watch."""
    done = subprocess.run(
        [node, "main.js", served.target, f"hf://{SOURCE}"],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    by_step = {step["step"]: step for step in steps}
    assert by_step["register"]["name"] == "models/all-minilm-l6-v2"
    assert by_step["download"]["done_bytes"] == by_step["download"]["total_bytes"] != "0"
    assert by_step["infer"]["shape"] == ["2", "384"]
    assert by_step["error"] == {"step": "error", "code": 5, "reason": "MODEL_NOT_FOUND"}
    sequences = [int(step["sequence"]) for step in steps if step["step"] == "event"]
    assert sequences == list(range(sequences[0], sequences[-1] + 1))
    assert steps[-1]["reason"] == "READY"


def test_typescript_does_it_with_generated_types(node: str, served: Daemon) -> None:
    """The types come of the protos, the compiler takes the program, and the program does the main job."""
    npm = shutil.which("npm")
    if npm is None or not (EXAMPLE / "node_modules" / "typescript").is_dir():
        pytest.skip("TypeScript is not installed: npm install in examples/node")

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=EXAMPLE, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(npm, "run", "--silent", "build")
    told = run(node, "typescript/build/main.js", served.target, f"hf://{SOURCE}").splitlines()
    download, infer, event = map(json.loads, told)
    assert download["name"] == "models/all-minilm-l6-v2"
    assert infer["shape"] == ["1", "384"]
    assert event["reason"] == "READY"
    assert event["name"].startswith("models/all-minilm-l6-v2/instances/")
