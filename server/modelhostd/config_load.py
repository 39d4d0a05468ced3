"""Reads the configuration: a TOML file, the environment, flags; and what a reload changes."""

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelhostd.config import SECTIONS, Config, Rule, build, default_home, flat, rules, user_home
from modelhostd.config_values import ConfigError, Expected, Secret, address, shown
from modelhostd.core.values import dataclass

PREFIX = "MODELHOST_"
FOREIGN = frozenset({"CONFIG", "TARGET", "FAILPOINTS"})
"""Names behind the prefix that are not keys: the file's path, the client's and the tests' variables."""

FILE_NAME = "modelhostd.toml"
FILE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Given:
    """A value as somebody wrote it, and where."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Reload:
    """What SIGHUP does: the configuration from now on, and the keys that changed."""

    config: Config
    live: tuple[str, ...]
    """These act now."""
    restart: tuple[str, ...]
    """These differ from what the daemon runs with, and act after a restart."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`load` understands."""
    parser.add_argument("--home", metavar="PATH", help="where all state is")
    parser.add_argument(
        "--grpc",
        metavar="ADDRESS",
        action="append",
        help="HOST:PORT or unix:/PATH to serve; may be repeated",
    )
    parser.add_argument(
        "--http",
        metavar="ADDRESS",
        help="HOST:PORT of /metrics and /healthz, or off (default 127.0.0.1:7412)",
    )
    parser.add_argument("--config", metavar="FILE", help="the TOML file to read")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        help="any other key, such as limits.max_connections=64; may be repeated",
    )


def load(
    arguments: argparse.Namespace | None = None, environment: Mapping[str, str] | None = None
) -> Config:
    """Return the configuration. Raises ConfigError, which says in one line what is wrong and where."""
    environment = os.environ if environment is None else environment
    path, given = _gather(arguments, environment)
    table = rules()
    parsed = {name: parse(name, table[name], one) for name, one in given.items()}
    config = dataclasses.replace(build(parsed, environment), path=path)
    check(config, given)
    return config


def load_home(
    arguments: argparse.Namespace | None = None, environment: Mapping[str, str] | None = None
) -> Path:
    """Return the home alone, for commands that serve nobody. Raises ConfigError."""
    environment = os.environ if environment is None else environment
    _, given = _gather(arguments, environment)
    if "home" not in given:
        return default_home(environment)
    home: Path = parse("home", rules()["home"], given["home"])
    return home


def _gather(
    arguments: argparse.Namespace | None, environment: Mapping[str, str]
) -> tuple[Path | None, Mapping[str, Given]]:
    path = file_path(arguments, environment)
    given: dict[str, Given] = {}
    for source in (
        from_file(path) if path else {},
        from_environment(environment),
        from_arguments(arguments),
    ):
        given.update(source)
    return path, given


def reload(
    running: Config,
    arguments: argparse.Namespace | None = None,
    environment: Mapping[str, str] | None = None,
) -> Reload:
    """Read everything again. Raises ConfigError, and then the running configuration stands."""
    environment = os.environ if environment is None else environment
    wanted = load(arguments, environment)
    table, old, new = rules(), flat(running), flat(wanted)
    changed = [name for name in table if old[name] != new[name]]
    live = tuple(name for name in changed if table[name].live)
    result = running
    for name in live:
        result = _replace(result, name, new[name])
    explicit = {name for name in running.explicit if not table[name].live}
    explicit |= {name for name in wanted.explicit if table[name].live}
    return Reload(
        config=dataclasses.replace(result, explicit=frozenset(explicit)),
        live=live,
        restart=tuple(name for name in changed if not table[name].live),
    )


def _replace(config: Config, name: str, value: Any) -> Config:
    section, _, last = name.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{last: value})
    changed = dataclasses.replace(getattr(config, section), **{last: value})
    return dataclasses.replace(config, **{section: changed})


def file_path(arguments: argparse.Namespace | None, environment: Mapping[str, str]) -> Path | None:
    """Return the file to read: the one that was named, else the user's own if there is one."""
    named = getattr(arguments, "config", None) or environment.get(PREFIX + "CONFIG")
    if named:
        return Path(named).expanduser().absolute()
    base = environment.get("XDG_CONFIG_HOME") or str(user_home(environment) / ".config")
    usual = Path(base) / "modelhost" / FILE_NAME
    return usual if usual.is_file() else None


def from_file(path: Path) -> Mapping[str, Given]:
    """Return what stands in a TOML file."""
    import tomllib  # here: a start without a file does without it

    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError("config", f"more than {FILE_BYTES_MAX} bytes", str(path))
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError("config", f"the configuration cannot be read: {why}", str(path)) from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise ConfigError("config", f"not valid TOML: {error}", str(path)) from None
    found = {}
    for name, value in _dotted(content):
        origin = f"{path}:{_line(text, name)}"
        known = _known(name, origin)
        if known.only_variable:
            raise ConfigError(
                name, f"{name} belongs into the variable {known.variables[0]}, not a file", origin
            )
        found[name] = Given(value, origin)
    return found


def _dotted(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if name in SECTIONS and isinstance(value, dict):
            for inner, one in value.items():
                yield f"{name}.{inner}", one
        else:
            yield name, value


def _line(text: str, name: str) -> int:
    """Return the line on which a key stands; of its table where that cannot be told, else 1."""
    section, _, last = name.rpartition(".")
    table, best = "", 1
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([\w.\"'-]+?)\s*\]", line):
            table = header[1].strip("\"'")
            if table in (section, name):
                best = number
        written = re.match(r"\s*([\w.\"' -]+?)\s*=", line)
        if written:
            there = written[1].replace('"', "").replace("'", "").replace(" ", "")
            if (f"{table}.{there}" if table else there) in (name, f"{section}.{last}"):
                return number
    return best


def from_environment(environment: Mapping[str, str]) -> Mapping[str, Given]:
    """Return what variables say: those of other programs first, then MODELHOST_*."""
    found = {}
    names = {PREFIX + name.replace(".", "_").upper(): name for name in rules()}
    for name, rule in rules().items():
        for variable in rule.variables:
            if environment.get(variable):
                found[name] = Given(environment[variable], variable)
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable.removeprefix(PREFIX) in FOREIGN:
            continue
        if variable not in names:
            raise ConfigError(variable, f"no such setting{_nearest(variable, names)}", variable)
        if value:
            found[names[variable]] = Given(value, variable)
    return found


def from_arguments(arguments: argparse.Namespace | None) -> Mapping[str, Given]:
    """Return what flags say."""
    found: dict[str, Given] = {}
    for text in getattr(arguments, "set", None) or ():
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(name, f"expected KEY=VALUE, got {shown(text)}", "--set")
        rule = _known(name, "--set")
        if rule.only_variable:
            raise ConfigError(
                name,
                f"{name} belongs into the variable {rule.variables[0]}: flags can be seen by all",
                "--set",
            )
        found[name] = Given(value, f"--set {name}")
    for name in ("home", "grpc", "http", "log_level"):
        value = getattr(arguments, name, None)
        if value is not None:
            found[name] = Given(value, "--" + name.replace("_", "-"))
    return found


def _known(name: str, origin: str) -> Rule:
    table = rules()
    if name in table:
        return table[name]
    if name in SECTIONS:
        raise ConfigError(name, f"{name} is a section: write [{name}] and its keys", origin)
    raise ConfigError(name, f"no setting '{name}'{_nearest(name, table)}", origin)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    """Return the known key that was probably meant, as the end of a sentence."""
    import difflib  # here: for mistakes only

    lasts: dict[str, str] = {}
    for one in known:
        lasts.setdefault(one.rpartition(".")[2], one)
    near = difflib.get_close_matches(name, [*known, *SECTIONS], n=1, cutoff=0.6)
    if not near:
        last = difflib.get_close_matches(name.rpartition(".")[2], lasts, n=1, cutoff=0.6)
        near = [lasts[one] for one in last]
    if near and near[0] in SECTIONS:
        return f"; did you mean the section [{near[0]}]?"
    return f"; did you mean '{near[0]}'?" if near else "; `modelhostd --help` says where they stand"


def parse(name: str, rule: Rule, given: Given) -> Any:
    """Return a value as its key wants it. Raises ConfigError."""
    try:
        value = rule.parse(given.value)
        if name == "grpc":
            for one in value:
                address(one)
        if rule.choices and not set(value if isinstance(value, tuple) else (value,)) <= set(
            rule.choices
        ):
            raise Expected("one of " + ", ".join(rule.choices))
        if isinstance(value, int | float) and not isinstance(value, bool):
            if rule.least is not None and value < rule.least:
                raise Expected(f"at least {rule.least:.15g}")
            if rule.most is not None and value > rule.most:
                raise Expected(f"at most {rule.most:.15g}")
        return value
    except Expected as error:
        actual = Secret("") if rule.only_variable else given.value
        raise ConfigError(
            name, f"{name}: expected {error}; got {shown(actual)}", given.origin
        ) from None


def check(config: Config, given: Mapping[str, Given]) -> None:
    """Refuse values that are right one by one and wrong together."""

    def refuse(name: str, message: str) -> None:
        origin = given[name].origin if name in given else ""
        raise ConfigError(name, f"{name}: {message}", origin)

    if not config.grpc:
        refuse("grpc", "expected at least one address")
    listed = [str(one) for one in config.addresses]
    fixed = [text for text in listed if not text.endswith(":0")]
    if len(set(fixed)) != len(fixed):
        refuse("grpc", f"an address stands there twice: {', '.join(listed)}")
    if config.http in fixed:
        refuse("http", f"{config.http} is one of the addresses of grpc")
    if f"unix:{config.admin_socket}" in listed:
        refuse("admin_socket", "the users' and the operators' socket must differ")
    if not re.fullmatch(r"0?[0-7]{3}", config.socket_mode):
        refuse("socket_mode", f"expected an octal mode such as 0660; got {config.socket_mode!r}")
    limits = config.limits
    if limits.inference_bytes_in_flight < limits.inference_message_bytes:
        refuse(
            "limits.inference_bytes_in_flight",
            f"expected at least limits.inference_message_bytes ({limits.inference_message_bytes}); "
            f"got {limits.inference_bytes_in_flight}",
        )
    if not config.worker.backends:
        refuse("worker.backends", "expected at least one backend")


def describe(config: Config | None = None) -> Sequence[str]:
    """Return one line ``key = value`` for every key, secrets hidden."""
    shown_values = flat(config or Config())
    return [f"{name} = {_written(value)}" for name, value in shown_values.items()]


def _written(value: Any) -> str:
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, tuple):
        return "[" + ", ".join(map(repr, value)) + "]"
    return "never" if value is None else repr(value)
