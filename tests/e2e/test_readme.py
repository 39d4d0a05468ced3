"""What the README shows is run as it is written, against the real daemon, a real model and the loopback hub."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from bench.models import minilm_dir
from modelhostd.api.unimplemented import UNIMPLEMENTED_METHODS
from tests.e2e.process import Daemon
from tests.e2e.readme import README, blocks, commands
from tests.support import free_port

pytestmark = pytest.mark.timeout(720)
"""A worker imports a library for seconds, which on a swamped machine is more than a minute."""

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    """A hub that serves the real model."""
    repo = Repo.from_folder(minilm_dir(), pipeline_tag="sentence-similarity", licence="apache-2.0")
    with LoopbackHub({MINILM: repo}) as running:
        yield running


@pytest.fixture
def served(make_daemon: Callable[..., Daemon], hub: LoopbackHub) -> Iterator[tuple[Daemon, int]]:
    """A daemon that downloads from that hub, and the port it serves beside its sockets."""
    port = free_port()
    daemon = make_daemon("--grpc", f"127.0.0.1:{port}", HF_ENDPOINT=hub.endpoint)
    with daemon:
        yield daemon, port


def _run(arguments: list[str], target: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "MODELHOST_TARGET": target, "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        arguments,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_the_python_example_runs(served: tuple[Daemon, int]) -> None:
    """The first Python block pulls, embeds, infers and watches until the model is READY."""
    daemon, _ = served
    example = blocks("python")[0]
    assert len(example.splitlines()) <= 24
    done = _run([sys.executable, "-c", example], daemon.target)
    assert done.returncode == 0, done.stderr
    assert "(2, 384) float32" in done.stdout
    assert "READY" in done.stdout


def test_the_commands_run(served: tuple[Daemon, int]) -> None:
    """Every `modelhost` command of the README ends well; the one that watches shows what is there and what happens."""
    daemon, _ = served
    ran = []
    for command in commands("modelhost"):
        if command.split()[1] == "events":
            _watch(shlex.split(command), daemon.target)
            continue
        done = _run(shlex.split(command), daemon.target)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        ran.append(command.split()[1])
    assert {"status", "pull", "ls", "infer", "ps"} <= set(ran)


def test_who_runs_the_daemon_is_its_operator(
    make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a target the command comes by the admin socket of the user's own daemon; the users' one refuses."""
    with make_daemon() as daemon:
        # Where the sockets of a home are that nobody has placed elsewhere.
        (daemon.root / "run").symlink_to(daemon.root)
        monkeypatch.setenv("MODELHOST_HOME", str(daemon.root))
        done = _run(["modelhost", "rate", "20MB"], "")
        assert done.returncode == 0, done.stderr
        refused = _run(["modelhost", "rate", "20MB"], daemon.target)
        assert "PERMISSION_DENIED" in refused.stderr


def _watch(command: list[str], target: str) -> None:
    environment = {**os.environ, "MODELHOST_TARGET": target}
    with subprocess.Popen(
        [str(BIN / command[0]), *command[1:]], env=environment, stdout=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout is not None
        for line in watch.stdout:
            if "BOOKMARK" in line:
                break
        assert _run(["modelhost", "unload", "--all"], target).returncode == 0
        assert any("UNLOADED" in line for line in watch.stdout)
        watch.kill()


def test_tritonclient_runs_as_shown(served: tuple[Daemon, int]) -> None:
    """The block with Triton's client says that a model on disk is ready."""
    daemon, port = served
    assert _run(["modelhost", "pull", f"hf://{MINILM}"], daemon.target).returncode == 0
    example = blocks("python")[1].replace("7411", str(port))
    done = _run([sys.executable, "-c", example], daemon.target)
    assert done.returncode == 0, done.stderr


def test_buf_curl_runs_as_shown(served: tuple[Daemon, int]) -> None:
    """The same job by `buf curl` and reflection: register, download, and a watch that begins."""
    daemon, port = served
    shown = [command.replace("7411", str(port)) for command in commands("buf")]
    assert len(shown) == 3
    for command in shown[:2]:
        done = _run(shlex.split(command), daemon.target)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert '"kind": "DOWNLOAD"' in done.stdout
    with subprocess.Popen(
        [str(BIN / "buf"), *shlex.split(shown[2])[1:]], stdout=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout is not None
        text = ""
        while "bookmark" not in text:
            line = watch.stdout.readline()
            assert line, text
            text += line
        watch.kill()
    assert "models/all-minilm-l6-v2" in text


def test_the_table_names_what_is_not_there_yet() -> None:
    """Every method that answers UNIMPLEMENTED stands in the README's table, and none that works does."""
    rows = [line for line in README.read_text().splitlines() if line.startswith("| ")]
    missing = " ".join(row.rsplit("|", 2)[1] for row in rows)
    for path in UNIMPLEMENTED_METHODS:
        method = path.rpartition("/")[2]
        assert method in missing, f"{method} answers UNIMPLEMENTED: add it to the README's table"
