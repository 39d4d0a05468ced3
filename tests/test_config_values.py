"""Values of the configuration: what is taken, and how a wrong one is refused."""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd import config_load
from modelhostd.config import rules
from modelhostd.config_load import load
from modelhostd.config_values import ConfigError

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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("10GB", 10**10),
        ("1048576", 2**20),
        ("2000000b", 2_000_000),
    ],
)
def test_sizes_are_read_with_their_units(text: str, expected: int) -> None:
    """Binary and decimal units are told apart; a bare number is bytes."""
    config = load(flags("--set", f"devices.sim_bytes={text}"), HOME)
    assert config.devices.sim_bytes == expected


def test_budgets_are_a_table_by_device(file: Path) -> None:
    """Budgets are given by device or by GPU UUID, in the file or in a variable."""
    file.write_text('[budgets]\ncpu = "8GiB"\n"GPU-0a1b2c3d-0000-0000-0000-000000000000" = 5\n')
    assert load(flags("--config", str(file)), HOME).budgets == {
        "cpu": 8 * 2**30,
        "GPU-0a1b2c3d-0000-0000-0000-000000000000": 5,
    }
    config = load(None, {**HOME, "MODELHOST_BUDGETS": "cpu=1GiB, cuda-0=2GiB"})
    assert config.budgets == {"cpu": 2**30, "cuda-0": 2 * 2**30}


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("127.0.0.1:7411", "127.0.0.1:7411"),
        ("127.9.9.9:0", "127.9.9.9:0"),
        ("localhost:80", "localhost:80"),
        ("[::1]:7411", "[::1]:7411"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
        ("unix:///run/x.sock", "unix:/run/x.sock"),
    ],
)
def test_addresses_that_are_served(address: str, shown: str) -> None:
    """Loopback addresses and unix sockets, one or more."""
    config = load(flags("--grpc", address, "--grpc", "unix:/run/other.sock"), HOME)
    assert [str(one) for one in config.addresses] == [shown, "unix:/run/other.sock"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("127.0.0.1:9", "127.0.0.1:9"),
        ("localhost:0", "localhost:0"),
        ("[::1]:7412", "[::1]:7412"),
        ("off", "None"),
        ("", "None"),
    ],
)
def test_where_http_is_served(text: str, shown: str) -> None:
    """HTTP is on one loopback address, or nowhere."""
    assert str(load(flags("--http", text), HOME).http_address) == shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:7412", "TLS and authentication"),
        ("gpu-box:7412", "TLS and authentication"),
        ("unix:/run/http.sock", "HOST:PORT"),
        ("7412", "HOST:PORT"),
        ("127.0.0.1:7411", "one of the addresses of grpc"),
    ],
)
def test_http_is_refused_where_grpc_would_be(text: str, expected: str) -> None:
    """Beyond loopback, on a socket, without a port or on gRPC's own address HTTP is refused."""
    error = refused("--http", text)
    assert error.key == "http"
    assert expected in str(error)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:7411",
        "[::]:7411",
        "192.168.1.5:1",
        "gpu-box:7411",
        "8.8.8.8:1",
        "[::ffff:8.8.8.8]:1",
    ],
)
def test_nothing_but_loopback_is_served(address: str) -> None:
    """Without TLS and authentication every other address is refused, with the way round."""
    error = refused("--grpc", address)
    assert "TLS and authentication" in str(error)
    assert address in str(error)
    assert "ssh -L" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "grpc=127.0.0.1",
            "grpc=:7411",
            "grpc=127.0.0.1:70000",
            "grpc=::1:7411",
            "grpc=unix:run/x",
        ),
        *("grpc=127.0.0.1:x", "grpc=", "grpc=127.0.0.1:5,127.0.0.1:5", "home=relative", "home="),
        *("limits.max_connections=0", "limits.max_connections=many", "limits.max_connections=1.5"),
        *("limits.inference_message_bytes=4 gigs", "limits.inference_message_bytes=3GiB"),
        *("limits.inference_message_bytes=-1", "limits.control_message_bytes=1"),
        *("limits.inference_bytes_in_flight=2MiB", "log_level=loud", "log_format=xml"),
        *("uvloop=perhaps", "events.age_s=nan", "events.age_s=-1", "events.age_s=1"),
        *(
            "budgets=gpu=1",
            "budgets=cpu",
            "budgets=cpu=much",
            "budgets=cpu=0",
            "worker.backends=",
            "socket_mode=999",
        ),
        *("settings.keep_alive_s=soon", "settings.eviction_policy=random", "worker.arena_bytes=1"),
        *("admin_socket=relative.sock", "admin_socket=/run/modelhost.sock"),
    ],
)
def test_a_bad_value_names_the_key_and_what_was_expected(text: str) -> None:
    """Every refusal names the key, what it expects, and what came."""
    name, _, value = text.partition("=")
    error = refused("--set", "runtime_dir=/run", "--set", text)
    assert error.key == name
    assert error.key in error.message
    if value and not name.startswith("budgets"):
        assert (
            "expected" in error.message or "must differ" in error.message or "twice" in str(error)
        )


def test_a_bad_value_in_a_file_names_the_line(file: Path) -> None:
    """File and line are where the value stands, in whichever form the table is written."""
    file.write_text('# comment\nlog_level = "info"\n\n[limits]\n\nmax_connections = "x"\n')
    assert str(refused(file=file)).startswith(f"{file}:6: limits.max_connections: expected")
    file.write_text('log_level = "info"\nlimits.max_connections = "x"\n')
    assert str(refused(file=file)).startswith(f"{file}:2: ")
    file.write_text('limits = { max_connections = "x" }\n')
    assert str(refused(file=file)).startswith(f"{file}:1: ")


@pytest.mark.parametrize(
    ("text", "line", "nearest"),
    [
        ("hoem = '/x'", 1, "home"),
        ("\n[limits]\nmax_conections = 5", 3, "limits.max_connections"),
        ("max_connections = 5", 1, "limits.max_connections"),
        ("[limit]\nmax_connections = 5", 1, "limits"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, text: str, line: int, nearest: str) -> None:
    """A typo in a file is an error that names what was probably meant, and where it stands."""
    file.write_text(text)
    error = str(refused(file=file))
    assert error.startswith(f"{file}:{line}: ")
    assert f"did you mean '{nearest}" in error or f"did you mean the section [{nearest}]" in error


def test_an_unknown_variable_or_flag_names_the_nearest() -> None:
    """The same for variables and for --set."""
    error = refused(environment={**HOME, "MODELHOST_LOGLEVEL": "info"})
    assert "MODELHOST_LOG_LEVEL" in str(error)
    assert "'events.count'" in str(refused("--set", "events.cuont=5"))
    assert "[limits]" in str(refused("--set", "limits=5"))
    assert "KEY=VALUE" in str(refused("--set", "log_level"))
    assert "help" in str(refused("--set", "zzzzzzzz=5"))


@pytest.mark.parametrize(
    "content", [b"home = ", b"\xff\xfe", b"a = 1\na = 2", b"[" * 5000, b"a" * 2_000_000]
)
def test_a_file_that_is_no_toml_is_refused(file: Path, content: bytes) -> None:
    """A broken or huge file is an error with its path."""
    file.write_bytes(content)
    assert str(file) in str(refused(file=file))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    """A path that cannot be read says why."""
    assert "directory" in str(refused(file=tmp_path))


def test_a_unix_path_that_is_too_long_is_named() -> None:
    """Over 107 bytes a socket cannot be bound; the error has the path, its length and a way out."""
    long = "/" + "x" * 107
    error = refused("--grpc", f"unix:{long}")
    assert long in str(error)
    assert "107" in str(error)
    load(flags("--grpc", f"unix:{long[:-1]}"), HOME)
    assert "ü" * 60 in str(refused("--grpc", "unix:/" + "ü" * 60))
    deep = "/" + "d" * 100
    assert f"{deep}/run/modelhost.sock" in str(refused("--home", deep))
    load(flags("--home", deep, "--set", "runtime_dir=/run/m"), HOME)


# hostile input


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(name=st.sampled_from(sorted(rules())), value=values)
def test_any_value_is_taken_or_refused(name: str, value: Any) -> None:
    """Whatever type stands at a key, the answer is a value of the key or a ConfigError."""
    given_ = config_load.Given(value, "here")
    with contextlib.suppress(ConfigError):
        config_load.parse(name, rules()[name], given_)


@given(st.text(max_size=200))
def test_any_file_is_read_or_refused(text: str) -> None:
    """Whatever text a file holds, nothing but ConfigError comes of it."""
    path = Path("/proc/self/fd/0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: text)
        with contextlib.suppress(ConfigError):
            config_load.from_file(path)
