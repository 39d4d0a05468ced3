"""A program: the daemon as it is, its workers able to import this folder, its back-off and tasks in view.

``python bench/faulty_daemon.py [arguments of modelhostd]``. Each crash of a worker counts as the first, or the back-off
of a thousand of them would take a day. FAULTY_HEARTBEAT_S is the time between heartbeats. On SIGUSR2 it writes the
names of its tasks to FAULTY_TASKS. How late its loop is goes to FAULTY_LAG, if that is set (``loop_lag.py``).
"""

import asyncio
import dataclasses
import gc
import json
import os
import signal
import sys
from pathlib import Path

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import loop_lag

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the daemon."""
    from modelhostd import __main__, process

    process.prepare()  # before anything imports grpc; a second time changes nothing

    from modelhostd import daemon
    from modelhostd.adapters.workers.config import WorkersConfig
    from modelhostd.config import Config
    from modelhostd.core import backoff

    made = daemon._workers_config  # noqa: SLF001 - the one place where the workers' settings are made
    serve = daemon.Daemon.serve

    def workers_config(config: Config) -> WorkersConfig:
        found = dataclasses.replace(made(config), import_paths=(str(ROOT),))
        interval_s = os.environ.get("FAULTY_HEARTBEAT_S")
        if interval_s is None:
            return found
        return dataclasses.replace(found, heartbeat_interval_s=float(interval_s))

    async def serve_in_view(self: daemon.Daemon) -> int:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, tell_tasks)
        lag = os.environ.get("FAULTY_LAG")
        if lag is not None:
            loop_lag.watch(Path(lag))
        return await serve(self)

    daemon._workers_config = workers_config  # noqa: SLF001
    daemon.Daemon.serve = serve_in_view  # type: ignore[method-assign]
    backoff.RESET_AFTER_S = 0.0
    return __main__.main()


def tell_tasks() -> None:
    """Write which tasks there are, once what nobody holds is gone."""
    gc.collect()
    path = Path(os.environ["FAULTY_TASKS"])
    part = path.with_suffix(".part")
    part.write_text(json.dumps(sorted(task.get_name() for task in asyncio.all_tasks())))
    part.rename(path)


if __name__ == "__main__":
    sys.exit(main())
