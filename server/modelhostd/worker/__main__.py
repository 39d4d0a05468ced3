"""Start of a worker process. The daemon runs this file by its path, in Python's isolated mode.

By path, not ``-m``: isolated mode (``-I``, so that neither the environment nor the working directory decides
what is imported) leaves only installed packages to be found, and a source tree that is run in place is
not installed. ``--code`` names the folders of the daemon's own code, which go before those: another version may be
installed, and the two ends of one protocol come from one place. ``--path`` names folders that go after them.
"""

import argparse
import sys
from collections.abc import Sequence


def main() -> int:
    """Tie this process to the daemon's life, then serve it."""
    parser = argparse.ArgumentParser(prog="modelhostd-worker", allow_abbrev=False)
    for name in ("parent", "control", "data", "requests", "responses", "images"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("code", "path"):
        parser.add_argument(f"--{name}", action="append", default=[])
    arguments = parser.parse_args()
    sys.path[:] = ordered(sys.path, arguments.code, arguments.path)

    from modelhostd.worker import own_threads, process

    process.die_with_parent(arguments.parent)
    process.report_crashes()
    own_threads.end_with_threads()
    process.prefer_as_victim()
    process.keep_heap()
    process.share_interpreter()

    from modelhostd.worker.executor import exit_now
    from modelhostd.worker.server import Descriptors, Worker

    worker = Worker(
        Descriptors(
            arguments.control,
            arguments.data,
            arguments.requests,
            arguments.responses,
            arguments.images,
        )
    )
    exit_now(worker.run())
    return 0


def ordered(found: Sequence[str], code: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Return where to import from: Python itself, the daemon's code, what is installed, what the operator added."""
    installed = [path for path in found if path.endswith(("site-packages", "dist-packages"))]
    first = found.index(installed[0]) if installed else len(found)
    return list(dict.fromkeys((*found[:first], *code, *found[first:], *extra)))


if __name__ == "__main__":
    sys.exit(main())
