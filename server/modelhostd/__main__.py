"""The command ``modelhostd``: serve (the default) and fsck.

Exit codes: 0 ended as asked, 1 failure (fsck: findings), 2 usage, 75 the home is in use or the daemon
could not end in time, 78 the configuration is wrong (sysexits.h's EX_TEMPFAIL and EX_CONFIG).
Signals: SIGTERM and SIGINT end it in order, a second one without waiting for calls in flight; SIGHUP reloads.
"""

import argparse
import gc
import signal
import sys
from collections.abc import Sequence

from modelhostd._version import __version__

EXIT_HELD = 75
EXIT_CONFIG = 78
MISSING_EXTRA = (
    "modelhostd needs the server extra: pip install 'modelhost[server]' ({name} is missing)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["fsck"]:
            from modelhostd.adapters.fsck import main as fsck

            return fsck(given[1:])
        # What a start makes stays: to look through it again and again takes 20 ms. The daemon collects
        # from READY on.
        gc.disable()
        return _serve(given[1:] if given[:1] == ["serve"] else given)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "modelhostd":
            raise
        return _fail(MISSING_EXTRA.format(name=error.name), EXIT_CONFIG)
    finally:
        gc.enable()


def _serve(given: Sequence[str]) -> int:
    # Whoever asks for a reload before there is anything to reload gets what is read now.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Before anything imports grpc: the allocator and grpc's experiments are read once.
    from modelhostd import process

    settings = process.prepare()

    from modelhostd.config_load import add_arguments, load
    from modelhostd.config_values import ConfigError

    parser = argparse.ArgumentParser(
        prog="modelhostd",
        description="One daemon that owns the devices of this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    add_arguments(parser)
    parser.epilog = "modelhostd fsck --help: check and repair a home that no daemon uses"
    parsed = parser.parse_args(given)
    try:
        config = load(parsed)
    except ConfigError as error:
        return _fail(str(error), EXIT_CONFIG)

    from modelhostd.adapters.lock import HomeHeldError, HomeLock
    from modelhostd.core.errors import ModelhostError
    from modelhostd.daemon import run

    lock = HomeLock(config.home)
    try:
        lock.acquire()
        return run(config, parsed, settings)
    except HomeHeldError as error:
        return _fail(str(error), EXIT_HELD)
    except ConfigError as error:
        return _fail(str(error), EXIT_CONFIG)
    except ModelhostError as error:
        return _fail(f"{error.message} [{error.reason}]", 1)
    finally:
        lock.release()


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"modelhostd: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
