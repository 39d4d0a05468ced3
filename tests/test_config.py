"""The configuration: where values come from, and what a wrong one gets."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import pytest

from modelhostd import config_load
from modelhostd.config import Config, flat, rules
from modelhostd.config_load import load
from modelhostd.config_values import ConfigError, Secret
from modelhostd.core.resources import Settings

ROOT = Path(__file__).resolve().parent.parent
HOME = {"HOME": "/home/ada"}


def flags(*texts: str) -> argparse.Namespace:
    """Return parsed flags."""
    parser = argparse.ArgumentParser()
    config_load.add_arguments(parser)
    return parser.parse_args(texts)


def refused(
    *texts: str, environment: Mapping[str, str] = HOME, file: Path | None = None
) -> ConfigError:
    """Return the error of loading: one line, and never more."""
    if file is not None:
        texts = (*texts, "--config", str(file))
    with pytest.raises(ConfigError) as caught:
        load(flags(*texts), environment)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 78
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return where a configuration file may be written."""
    return tmp_path / "modelhostd.toml"


# defaults


def test_defaults_of_a_user() -> None:
    """Without anything the state is in the user's data directory, and this machine alone is served."""
    config = load(None, HOME)
    home = Path("/home/ada/.local/share/modelhost")
    assert config.home == home
    assert [str(a) for a in config.addresses] == [
        "127.0.0.1:7411",
        f"unix:{home}/run/modelhost.sock",
    ]
    assert config.admin_socket == home / "run" / "admin.sock"
    assert str(config.http_address) == "127.0.0.1:7412"
    assert config.loopback_is_operator
    assert config.limits.inference_message_bytes == 64 * 2**20
    assert config.limits.control_message_bytes == 256 * 2**10
    assert config.downloads.cache == Path("/home/ada/.cache/huggingface/hub")
    assert config.path is None
    assert load(None, {**HOME, "XDG_DATA_HOME": "/data"}).home == Path("/data/modelhost")


def test_defaults_of_a_service() -> None:
    """Under systemd the directories that it made are used."""
    config = load(
        None,
        {
            **HOME,
            "STATE_DIRECTORY": "/var/lib/modelhost:/var/lib/other",
            "RUNTIME_DIRECTORY": "/run/modelhost",
        },
    )
    assert config.home == Path("/var/lib/modelhost")
    assert config.admin_socket == Path("/run/modelhost/admin.sock")
    assert config.grpc[1] == "unix:/run/modelhost/modelhost.sock"


def test_the_shipped_file_is_valid() -> None:
    """The file of `make install` loads, and there a client on this machine is no operator."""
    config = load(flags("--config", str(ROOT / "systemd" / "modelhostd.toml")), HOME)
    assert not config.loopback_is_operator
    assert config.path == ROOT / "systemd" / "modelhostd.toml"


# precedence


def test_flags_win_over_variables_over_the_file_over_defaults(file: Path) -> None:
    """Each source overrides the one before it, key by key."""
    file.write_text(
        'log_level = "error"\nhome = "/file"\nuvloop = false\n'
        "[limits]\nmax_connections = 1\nmax_streams = 7\n[events]\ncount = 500\n"
    )
    config = load(
        flags("--config", str(file), "--home", "/flag", "--set", "limits.max_connections=3"),
        {
            **HOME,
            "MODELHOST_HOME": "/variable",
            "MODELHOST_LOG_LEVEL": "DEBUG",
            "MODELHOST_LIMITS_MAX_CONNECTIONS": "2",
            "MODELHOST_EVENTS_COUNT": "",
        },
    )
    assert config.home == Path("/flag")
    assert config.log_level == "debug"
    assert not config.uvloop
    assert (config.limits.max_connections, config.limits.max_streams) == (3, 7)
    assert config.events.count == 500
    assert config.explicit == {
        *("log_level", "home", "uvloop", "events.count"),
        *("limits.max_connections", "limits.max_streams"),
    }


def test_the_file_is_found_by_flag_variable_or_in_its_usual_place(tmp_path: Path) -> None:
    """--config wins over MODELHOST_CONFIG, that over the user's own file; a named one must exist."""
    names = {name: tmp_path / f"{name}.toml" for name in ("flag", "variable")}
    usual = tmp_path / "config" / "modelhost" / "modelhostd.toml"
    usual.parent.mkdir(parents=True)
    for path in (*names.values(), usual):
        path.write_text(f'home = "/{path.stem}"')
    environment = {**HOME, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    assert load(None, environment).home == Path("/modelhostd")
    environment["MODELHOST_CONFIG"] = str(names["variable"])
    assert load(None, environment).home == Path("/variable")
    assert load(flags("--config", str(names["flag"])), environment).home == Path("/flag")
    missing = refused("--config", str(tmp_path / "no.toml"))
    assert str(tmp_path / "no.toml") in str(missing)


def test_variables_of_hugging_face_are_honoured() -> None:
    """HF_TOKEN, HF_ENDPOINT and HF_HUB_CACHE count; our own variables win over them."""
    environment = {
        **HOME,
        "HF_TOKEN": " hf_secret\t".strip(),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_CACHE": "/cache",
    }
    downloads = load(None, environment).downloads
    assert downloads.token == Secret("hf_secret")
    assert downloads.endpoint == "http://127.0.0.1:9"
    assert downloads.cache == Path("/cache")
    environment["MODELHOST_DOWNLOADS_ENDPOINT"] = "https://hub.example"
    assert load(None, environment).downloads.endpoint == "https://hub.example"
    assert load(None, {**HOME, "HF_HOME": "/hf"}).downloads.cache == Path("/hf/hub")


def test_the_client_s_variables_are_no_error() -> None:
    """A shell in which the client is set up can start the daemon."""
    load(None, {**HOME, "MODELHOST_TARGET": "127.0.0.1:1", "MODELHOST_FAILPOINTS": ""})


# secrets


def test_a_token_is_never_shown(file: Path) -> None:
    """No error, no repr and no listing shows the token, and it is refused where others could see it."""
    token = "hf_verysecret"
    config = load(None, {**HOME, "HF_TOKEN": token})
    assert token not in repr(config)
    assert token not in "\n".join(config_load.describe(config))
    assert "HF_TOKEN" in str(error := refused("--set", f"downloads.token={token}"))
    assert token not in str(error)
    file.write_text(f'[downloads]\ntoken = "{token}"')
    assert "HF_TOKEN" in str(error := refused(file=file))
    assert token not in str(error)
    bad = refused(environment={**HOME, "HF_TOKEN": token + "\n" + token})
    assert token not in str(bad)


# reload


def test_a_reload_says_what_is_live_and_what_waits(file: Path) -> None:
    """Live keys change at once, the others keep the value that the daemon runs with."""
    file.write_text('log_level = "info"\n[limits]\nmax_connections = 5\nmax_streams = 6\n')
    arguments = flags("--config", str(file), "--home", "/x")
    running = load(arguments, HOME)
    file.write_text('log_level = "debug"\n[limits]\nmax_connections = 7\nmax_streams = 8\n')
    result = config_load.reload(running, arguments, HOME)
    assert result.live == ("log_level", "limits.max_streams")
    assert result.restart == ("limits.max_connections",)
    assert result.config.log_level == "debug"
    assert result.config.limits.max_streams == 8
    assert result.config.limits.max_connections == 5
    again = config_load.reload(result.config, arguments, HOME)
    assert (again.live, again.restart) == ((), ("limits.max_connections",))
    file.write_text("log_level = 5\n")
    with pytest.raises(ConfigError):
        config_load.reload(running, arguments, HOME)


def test_a_key_that_was_taken_away_has_its_default_again(file: Path) -> None:
    """A reload after a line was deleted is a change like any other."""
    file.write_text('log_level = "debug"\n')
    running = load(flags("--config", str(file)), HOME)
    file.write_text("")
    result = config_load.reload(running, flags("--config", str(file)), HOME)
    assert result.live == ("log_level",)
    assert result.config.log_level == "info"
    assert "log_level" not in result.config.explicit


def test_settings_of_the_configuration_hold_over_the_stored_ones(file: Path) -> None:
    """Only what was set on purpose overrides what UpdateSettings stored."""
    file.write_text('log_level = "error"\n[settings]\nqueue_limit = 9\nkeep_alive_s = "never"\n')
    config = load(flags("--config", str(file)), HOME)
    stored = Settings(queue_limit=5, keep_alive_s=60.0, max_concurrent_loads=7, edit=4)
    assert config.settings_over(stored) == Settings(
        queue_limit=9, keep_alive_s=None, max_concurrent_loads=7, log_level="error", edit=4
    )
    assert load(None, HOME).settings_over(stored) is not None
    assert load(None, HOME).settings_over(stored) == stored


def test_every_setting_of_the_host_has_a_key() -> None:
    """The keys of [settings] and log_level are exactly the fields of Settings, with its defaults."""
    values = flat(Config())
    ours = {name.removeprefix("settings."): value for name, value in values.items()
            if name.startswith("settings.") or name == "log_level"}  # fmt: skip
    theirs = {name: getattr(Settings(), name) for name in Settings.__dataclass_fields__}
    theirs.pop("edit")
    assert ours == theirs


def test_every_key_can_be_set_by_a_variable() -> None:
    """No two keys have the same variable."""
    variables = {config_load.PREFIX + name.replace(".", "_").upper() for name in rules()}
    assert len(variables) == len(rules())
