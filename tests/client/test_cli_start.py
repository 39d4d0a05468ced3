"""The command starts fast, explains itself, and hands over to the daemon."""

import json
import os
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from modelhost.cli import daemon
from modelhost.cli.app import SECTIONS, app
from tests.client.double import Double

HEAVY = ("grpc", "numpy", "rich", "google.protobuf", "modelhost.v1", "modelhost.oip", "asyncio")


def all_commands() -> list[list[str]]:
    """Return the words of every command."""
    found: list[list[str]] = []
    for commands in SECTIONS.values():
        for command in commands:
            found.append([str(command.name)])
            if isinstance(command, click.Group):
                found += [[str(command.name), name] for name in command.commands]
    return found


def loaded_by(*arguments: str) -> list[str]:
    """Return the heavy modules that a run of the command has imported at its end."""
    code = (
        "import sys\n"
        "from modelhost.cli import main\n"
        "try:\n"
        f"    main({list(arguments)!r})\n"
        "except SystemExit:\n"
        f"    print('loaded:', *(m for m in {HEAVY!r} if m in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.rsplit("loaded:", 1)[1].split()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pull", "--help"], ["ops", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments) -> None:
    """grpc, protobuf, numpy and rich come in when a command needs them, not before."""
    assert loaded_by(*arguments) == []


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_command_explains_itself(words) -> None:
    """Each command has a sentence in its own help and in the list of its group; examples keep their lines."""
    if words == ["serve"]:
        return  # Its help is modelhostd's.
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0
    assert "Usage: modelhost" in done.output.replace("Usage: app", "Usage: modelhost")
    assert "\\b" not in done.output
    group = CliRunner().invoke(app, [*words[:-1], "--help"])
    assert f"  {words[-1]}" in group.output


def test_the_version_is_the_packages() -> None:
    """--version prints the version without asking a daemon."""
    import modelhost

    done = CliRunner().invoke(app, ["--version"])
    assert done.output == f"modelhost {modelhost.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["show"],
        ["pull", "a", "--priority", "x"],
        ["--format", "xml", "ls"],
        ["unload"],
        ["unload", "a", "--all"],
        ["infer", "m"],
        ["events", "--snapshot", "--since", "1"],
        ["infer", "m", "-i", "x"],
        ["infer", "m", "-i", "x=[1"],
        ["budget", "cpu", "lots"],
        ["add", "hf://o/n", "--label", "x"],
        ["add", "hf://o/n", "--config", "colour=1"],
        ["pull", "a", "--rate-limit", "fast"],
        ["--timeout", "0", "ls"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_2(arguments) -> None:
    """What cannot be meant is exit code 2, on stderr, before any call."""
    done = CliRunner().invoke(app, arguments, env={"MODELHOST_TARGET": "127.0.0.1:1"})
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Error: " in done.stderr


def test_python_m_modelhost_is_the_command() -> None:
    """The command runs as a module, too."""
    for module in ("modelhost", "modelhost.cli"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--version"], check=True, capture_output=True, text=True
        )
        assert done.stdout.startswith("modelhost ")


# --- serve ------------------------------------------------------------------------------------------


def test_serve_becomes_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """serve replaces this process by modelhostd, with every argument as it stands."""
    given: list[list[str]] = []
    monkeypatch.setattr(daemon, "missing_parts", list)
    monkeypatch.setattr(os, "execv", lambda path, arguments: given.append([path, *arguments]))
    CliRunner().invoke(app, ["serve", "--grpc", "h:1", "--help", "--timeout", "x", "fsck"])
    assert given == [
        [
            sys.executable,
            sys.executable,
            "-m",
            "modelhostd",
            "--grpc",
            "h:1",
            "--help",
            "--timeout",
            "x",
            "fsck",
        ]
    ]


def test_serve_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the server extra the missing parts and the command that brings them are named."""
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda name: [
            "grpcio>=1", "not-there-1>=2; extra == 'server'", 'not-there-2; extra == "server"',
            "not-wanted; extra == 'torch'",
        ],
    )  # fmt: skip
    assert daemon.missing_parts() == ["not-there-1", "not-there-2"]
    done = CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 1
    assert "not-there-1, not-there-2 missing" in done.stderr
    assert "pip install 'modelhost[server,torch]'" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell) -> None:
    """Each shell gets a script that asks this command."""
    done = CliRunner().invoke(app, ["completion", shell])
    assert done.exit_code == 0
    assert "_MODELHOST_COMPLETE" in done.stdout


def test_completion_knows_the_commands() -> None:
    """The shell's question is answered with commands and options."""
    done = subprocess.run(
        [sys.executable, "-c", "from modelhost.cli import main; main()"],
        env={**os.environ, "_MODELHOST_COMPLETE": "bash_complete", "COMP_WORDS": "modelhost un",
             "COMP_CWORD": "1"},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert [line.split(",")[-1] for line in done.stdout.split()] == ["unload", "unpin"]


def test_completion_knows_the_models(told: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's argument completes to the ids that the daemon has; to nothing where none answers."""
    shell = ShellComplete(app, {}, "modelhost", "_MODELHOST_COMPLETE")
    monkeypatch.setenv("MODELHOST_TARGET", told.target)
    assert [found.value for found in shell.get_completions(["show"], "mi")] == ["mini"]
    assert shell.get_completions(["load"], "x") == []
    told.stop()
    assert shell.get_completions(["unload"], "m") == []


def test_the_version_of_the_daemon_may_be_missing() -> None:
    """version tells the client's own where no daemon answers, with exit code 0."""
    env = {"MODELHOST_TARGET": "127.0.0.1:1"}
    done = CliRunner().invoke(app, ["version", "--json"], env=env)
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert told["client"]
    assert told["daemon"]["version"] == ""
    assert "127.0.0.1:1" in told["daemon"]["error"]
