"""Start of a worker process. The daemon runs this file by its path, in Python's isolated mode.

By path, not ``-m``: isolated mode (``-I``, so that neither the environment nor the working directory decides
what is imported) leaves only installed packages to be found, and a source tree that is run in place is
not installed. ``--path`` names the folders to import from after those.
"""

import argparse
import sys


def main() -> int:
    """Tie this process to the daemon's life, then serve it."""
    parser = argparse.ArgumentParser(prog="modelhostd-worker", allow_abbrev=False)
    for name in ("parent", "control", "data", "requests", "responses"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--path", action="append", default=[])
    arguments = parser.parse_args()
    sys.path += [path for path in arguments.path if path not in sys.path]

    from modelhostd.worker import process

    process.die_with_parent(arguments.parent)
    process.report_crashes()
    process.prefer_as_victim()
    process.keep_heap()
    process.share_interpreter()

    from modelhostd.worker.executor import exit_now
    from modelhostd.worker.server import Descriptors, Worker

    worker = Worker(
        Descriptors(arguments.control, arguments.data, arguments.requests, arguments.responses)
    )
    exit_now(worker.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
