"""Makes ``modelhost._sync`` from ``modelhost._async``: the same text without asyncio.

    python client/generate_sync.py            write
    python client/generate_sync.py --check    fail when a file is not what would be written

``transport.py`` is written by hand in both: the two halves of grpc differ there.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ASYNC = ROOT / "modelhost" / "_async"
SYNC = ROOT / "modelhost" / "_sync"
BY_HAND = {"__init__.py", "transport.py"}

HEADER = "# Made from modelhost/_async/{name} by generate_sync.py: do not edit, change that.\n"

RULES = (
    (r"(?m)^# ruff: noqa: ASYNC.*\n", ""),
    (r"\basync (?=def|with|for)", ""),
    (r"\bawait ", ""),
    (r"\bmodelhost\._async\b", "modelhost._sync"),
    (r"\bAsync(?=[A-Z])", ""),  # AsyncClient, AsyncIterator, AsyncWatch, ...
    (r"\b__a(enter|exit|iter|next)__\b", r"__\1__"),
    (r"\bStopAsyncIteration\b", "StopIteration"),
)


def translate(name: str, text: str) -> str:
    """Return the twin of a module, in the project's format."""
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    path = SYNC / name
    text = _ruff(
        "check",
        "--select",
        "I,UP028",
        "--unsafe-fixes",
        "--fix-only",
        "--quiet",
        path=path,
        text=text,
    )
    return HEADER.format(name=name) + _ruff("format", "--quiet", path=path, text=text)


def twins() -> dict[Path, str]:
    """Return the text of every module that is made."""
    return {
        SYNC / source.name: translate(source.name, source.read_text())
        for source in sorted(ASYNC.glob("*.py"))
        if source.name not in BY_HAND
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the twins, or tell which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    checking = parser.parse_args(arguments).check
    made = twins()
    stale = [p for p, text in made.items() if not p.is_file() or p.read_text() != text]
    stale += [p for p in SYNC.glob("*.py") if p not in made and p.name not in BY_HAND]
    for path in stale:
        if checking:
            sys.stderr.write(f"{path.relative_to(ROOT.parent)} is not what _async says; ")
            sys.stderr.write("run: python client/generate_sync.py\n")
        elif path in made:
            path.write_text(made[path])
        else:
            path.unlink()
    return 1 if checking and stale else 0


def _ruff(*command: str, path: Path, text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path), "-"],
        cwd=ROOT.parent,
        input=text,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
