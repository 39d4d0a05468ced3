"""The service's files, checked by systemd's own tools; they need no systemd as the first process."""

import argparse
import configparser
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from modelhostd.config import Config, flat, rules
from modelhostd.config_load import load
from modelhostd.config_values import ConfigError

ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "systemd" / "modelhostd.service"
EXAMPLE = ROOT / "systemd" / "modelhostd.toml"
EXPOSURE_MAX = 14  # tenths; what a unit with GPU and network can reach on systemd 252


def needs(tool: str) -> pytest.MarkDecorator:
    """Skip where one of systemd's tools is absent."""
    return pytest.mark.skipif(
        shutil.which(tool) is None, reason=f"{tool} is not present (Debian package: systemd)"
    )


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command and return how it ended and what it said."""
    return subprocess.run(command, check=False, capture_output=True, text=True)


def settings(text: str) -> dict[str, list[str]]:
    """Return every key of a unit with its values in order; keys may repeat."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Return a copy of the unit whose program exists here; the name must stay."""
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text()))
    return copy


# --- the unit -------------------------------------------------------------------------------------------


@needs("systemd-analyze")
def test_the_unit_is_valid(unit: Path) -> None:
    """systemd-analyze verify finds no unknown key and no bad value."""
    done = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", unit)
    assert (done.returncode, done.stderr) == (0, "")


@needs("systemd-analyze")
def test_an_unknown_key_would_be_found(unit: Path) -> None:
    """The check above can fail: a misspelt key is an error."""
    unit.write_text(unit.read_text() + "\n[Service]\nWatchdogSecs=30\n")
    done = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", unit)
    assert done.returncode != 0
    assert "WatchdogSecs" in done.stderr


@needs("systemd-analyze")
def test_the_unit_is_hardened(unit: Path) -> None:
    """The exposure that systemd-analyze computes stays at or below what GPU and network need."""
    command = ("systemd-analyze", "security", "--no-pager", "--offline=true")
    done = run(*command, f"--threshold={EXPOSURE_MAX}", unit)
    assert done.returncode == 0, done.stdout


@needs("systemd-analyze")
def test_a_softer_unit_would_be_found(unit: Path) -> None:
    """The check above can fail: without its own user the unit is too exposed."""
    unit.write_text(unit.read_text().replace("User=modelhost\n", ""))
    command = ("systemd-analyze", "security", "--no-pager", "--offline=true")
    assert run(*command, f"--threshold={EXPOSURE_MAX}", unit).returncode != 0


def test_the_unit_keeps_the_service_alive() -> None:
    """What the daemon relies on in its service manager is set as it expects."""
    expected = {
        "Type": ["notify"],
        "WatchdogSec": ["30"],
        "TimeoutAbortSec": ["15"],
        "Restart": ["always"],
        "OOMPolicy": ["continue"],
        "KillMode": ["mixed"],
        "ExecReload": ["/bin/kill -HUP $MAINPID"],
        "StateDirectory": ["modelhost"],
        "CacheDirectory": ["modelhost"],
        "RuntimeDirectory": ["modelhost"],
        "DevicePolicy": ["closed"],
    }
    found = settings(UNIT.read_text())
    assert {key: found.get(key) for key in expected} == expected


def test_every_odd_setting_says_why() -> None:
    """Outside the list of plain hardening, a setting that is repeated or off the default has a comment."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(UNIT)
    assert parser.sections() == ["Unit", "Service", "Install"]
    lines = UNIT.read_text().splitlines()
    for key in (
        "OOMPolicy",
        "KillMode",
        "Restart",
        "ProcSubset",
        "DeviceAllow",
        "SystemCallFilter",
    ):
        first = next(i for i, line in enumerate(lines) if line.startswith(f"{key}="))
        assert lines[first - 1].startswith("#"), f"say above {key} why it is as it is"


# --- the example configuration ------------------------------------------------------------------------

SERVICE = {
    "HOME": "/var/lib/modelhost",
    "STATE_DIRECTORY": "/var/lib/modelhost",
    "RUNTIME_DIRECTORY": "/run/modelhost",
    "XDG_CACHE_HOME": "/var/cache/modelhost",
}


def loaded(path: Path) -> Config:
    """Load a configuration file with what systemd says to the service."""
    return load(argparse.Namespace(config=str(path)), SERVICE)


def test_the_example_configuration_is_the_services() -> None:
    """As shipped it changes one thing: a program on the machine is not an operator."""
    config = loaded(EXAMPLE)
    assert config.explicit == {"loopback_is_operator"}
    assert config.loopback_is_operator is False


def test_what_the_example_comments_out_is_valid(tmp_path: Path) -> None:
    """The example shows every key, with a valid value that is the default's, but for a few examples."""
    path = tmp_path / EXAMPLE.name
    path.write_text(re.sub(r"(?m)^#(?=[\[a-z])", "", EXAMPLE.read_text()))
    shown = loaded(path)
    assert shown.explicit == {name for name, rule in rules().items() if not rule.only_variable}
    shipped = flat(loaded(EXAMPLE))
    different = {name for name, value in flat(shown).items() if value != shipped[name]}
    examples = {"credentials", "gs_credentials", "file_roots"}
    assert different == {"budgets", *(f"downloads.{name}" for name in examples)}


def test_the_service_keeps_its_state_where_the_unit_says() -> None:
    """State and sockets are in the directories that the unit gives, reached by the unit's group."""
    config = loaded(EXAMPLE)
    assert config.home == Path("/var/lib/modelhost")
    assert config.grpc == ("127.0.0.1:7411", "unix:/run/modelhost/modelhost.sock")
    assert config.admin_socket == Path("/run/modelhost/admin.sock")
    assert config.downloads.cache == Path("/var/cache/modelhost/huggingface/hub")


def test_the_unit_waits_longer_than_the_daemon_takes_to_stop() -> None:
    """systemd's deadline for a stop is beyond the sum of the daemon's own."""
    shutdown = loaded(EXAMPLE).shutdown
    own = shutdown.drain_timeout_s + shutdown.worker_timeout_s + shutdown.exit_timeout_s
    assert own < float(settings(UNIT.read_text())["TimeoutStopSec"][0])


def test_a_configuration_that_is_refused_is_not_tried_again() -> None:
    """The exit code of a refused configuration is the one that the unit does not restart after."""
    assert settings(UNIT.read_text())["RestartPreventExitStatus"] == [str(ConfigError.exit_code)]


# --- users and directories ----------------------------------------------------------------------------


def install(root: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    """Install the files into ``root`` as a package would."""
    return run("make", "-C", ROOT, "install", f"DESTDIR={root}", *variables)


@needs("systemd-sysusers")
@needs("systemd-tmpfiles")
@pytest.mark.skipif(os.geteuid() != 0, reason="giving files to the service's user needs root")
def test_users_and_directories_are_made(tmp_path: Path) -> None:
    """The files for sysusers and tmpfiles make user, groups and directories, here in a root apart."""
    assert install(tmp_path).returncode == 0
    (tmp_path / "etc").mkdir(exist_ok=True)
    made = run("systemd-sysusers", f"--root={tmp_path}")
    assert made.returncode == 0, made.stderr
    users = {
        line.split(":")[0]: line.split(":")
        for line in (tmp_path / "etc" / "passwd").read_text().splitlines()
    }
    groups = {
        line.split(":")[0]: line.split(":")[3]
        for line in (tmp_path / "etc" / "group").read_text().splitlines()
    }
    assert users["modelhost"][5] == "/var/lib/modelhost"
    assert users["modelhost"][6].endswith("nologin")
    assert groups.keys() == {"modelhost", "modelhost-admin", "video", "render"}
    assert groups["video"] == groups["render"] == "modelhost"

    made = run("systemd-tmpfiles", f"--root={tmp_path}", "--create")
    assert made.returncode == 0, made.stderr
    modes = {
        path: stat.S_IMODE((tmp_path / path).stat().st_mode)
        for path in ("var/lib/modelhost", "var/cache/modelhost", "etc/modelhost")
    }
    assert list(modes.values()) == [0o750, 0o750, 0o755]


# --- make install -------------------------------------------------------------------------------------


def test_install_puts_exactly_these_files(tmp_path: Path) -> None:
    """With DESTDIR, `make install` writes four files and nothing else."""
    done = install(tmp_path, "PREFIX=/opt/modelhost")
    assert done.returncode == 0, done.stderr
    files = {str(p.relative_to(tmp_path)): p for p in tmp_path.rglob("*") if not p.is_dir()}
    assert files.keys() == {
        "etc/modelhost/modelhostd.toml",
        "opt/modelhost/lib/systemd/system/modelhostd.service",
        "opt/modelhost/lib/sysusers.d/modelhostd.conf",
        "opt/modelhost/lib/tmpfiles.d/modelhostd.conf",
    }
    assert {stat.S_IMODE(p.stat().st_mode) for p in files.values()} == {0o644}


def test_the_installed_unit_starts_the_installed_program(tmp_path: Path) -> None:
    """The unit names the program below PREFIX and the configuration below SYSCONFDIR."""
    install(tmp_path, "PREFIX=/opt/modelhost", "SYSCONFDIR=/opt/etc")
    installed = tmp_path / "opt/modelhost/lib/systemd/system/modelhostd.service"
    (start,) = settings(installed.read_text())["ExecStart"]
    assert (
        start
        == "/opt/modelhost/lib/modelhost/bin/modelhostd --config /opt/etc/modelhost/modelhostd.toml"
    )


def test_install_keeps_the_operators_configuration(tmp_path: Path) -> None:
    """A second installation replaces the unit, never the configuration."""
    install(tmp_path)
    config = tmp_path / "etc/modelhost/modelhostd.toml"
    config.write_text("# mine\n")
    assert install(tmp_path).returncode == 0
    assert config.read_text() == "# mine\n"


def test_a_virtual_environment_is_not_installed_into_a_package(tmp_path: Path) -> None:
    """WITH_VENV=1 with DESTDIR is refused before anything is written."""
    done = install(tmp_path, "WITH_VENV=1")
    assert done.returncode != 0
    assert "cannot be moved" in done.stderr
    assert list(tmp_path.iterdir()) == []
