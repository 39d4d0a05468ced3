"""Every figure that the project promises, each beside its reference in the same run: ``make bench``.

    python bench/figures.py                     everything, in some minutes; writes bench/RESULTS.md
    python bench/figures.py --part start        one part (or several), printed only; --output FILE keeps the
                                                other parts of a file as they are
    python bench/figures.py --quick             everything in little: does it run?

A part that fails is reported as such, and the others go on. What stands in RESULTS.md below its marker is
written by hand and stays. Downloads, and inference beside other servers, are measured apart, by `make
bench-downloads` and `make bench-peers`: they want programs of others, and gigabytes.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import (
    adoption,
    control,
    downloads,
    generation,
    inference,
    parts,
    policies,
    residency,
    start,
    switching,
)
from bench.figure import COLUMNS, Effort, Figure, Part
from bench.peers import identity, sentences

RESULTS = Path(__file__).with_name("RESULTS.md")
BY_HAND = "<!-- by hand: what follows is kept when the figures above are written anew -->"
FULL, QUICK = Effort(4), Effort(1, 0.02)
PACKAGES = ("grpcio", "protobuf", "uvloop", "numpy", "torch")

PARTS: Sequence[Part] = (
    Part("start", str(start.__doc__), start.figures),
    Part("control", str(control.__doc__), control.figures),
    Part("inference", str(inference.__doc__), inference.figures),
    Part("generation", str(generation.__doc__), generation.figures),
    Part("metrics", parts.METRICS, parts.metrics),
    Part("ending", parts.ENDING, parts.ending_),
    Part("connections", parts.CONNECTIONS, parts.connections_),
    Part("subscribers", parts.SUBSCRIBERS, parts.subscribers_),
    Part("faults", parts.FAULTS, parts.faults_),
    Part("policies", str(policies.__doc__), policies.figures),
    Part("switching", str(switching.__doc__), switching.figures),
    Part("residency", str(residency.__doc__), residency.figures),
    Part("adoption", str(adoption.__doc__), adoption.figures),
)
APART: Sequence[Part] = (
    Part("peers", str(identity.__doc__), identity.figures),
    Part("embeddings", str(sentences.__doc__), sentences.figures),
    Part("downloads", str(downloads.__doc__), downloads.figures),
)
"""Measured only when asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns 1 where a part could not be measured, whatever the figures are."""
    names = [part.name for part in (*PARTS, *APART)]
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--part", action="append", choices=names, help="only this one; repeatable")
    parser.add_argument("--quick", action="store_true", help="hardly any requests: does it run?")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--output", type=Path, help="where to write; a full run: bench/RESULTS.md")
    given = parser.parse_args(arguments)
    effort = QUICK if given.quick else Effort(given.rounds)
    wanted = [part for part in (*PARTS, *APART) if part.name in given.part] if given.part else PARTS
    head = conditions()
    sections: dict[str, str] = {}
    failed = False
    for part in wanted:
        begun = time.monotonic()
        try:
            section = table(part.measure(effort))
        except Exception as error:
            traceback.print_exc()
            why = str(error).strip().rpartition("\n")[2]  # of a daemon's traceback the last line
            section = f"**not measured**: {type(error).__name__}: {why}"
            failed = True
        print(f"# {part.name}\n{section}\n", flush=True)
        print(f"# {part.name} took {time.monotonic() - begun:.0f} s", file=sys.stderr)
        when = f"{measured_apart()}\n\n" if given.part else ""
        sections[part.name] = f"{part.how.strip()}\n\n{when}{section}"
    output = given.output
    if output is None and not given.quick and not given.part:
        output = RESULTS
    if output is not None:
        write(output, head, sections, apart=bool(given.part))
    return 1 if failed else 0


def table(figures: Sequence[Figure]) -> str:
    """Return figures as a table of Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(figure.row() for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def conditions() -> str:
    """Return when, where, of what and how it is measured."""
    told = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "load average before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in told.items())
    return (
        "# Figures\n\nWritten by `make bench`; read ratios, not rates. A figure and its reference take "
        f"turns in one run; medians of rounds.\n\n{lines}"
    )


def measured_apart() -> str:
    """Return when, and of what, a part alone is measured."""
    told = f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, commit {commit()}"
    loads = " ".join(f"{load:.2f}" for load in os.getloadavg())
    return f"Measured apart from the others: {told}, load average at its end {loads}."


def commit() -> str:
    """Return the commit that is measured, and whether files differ from it."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, check=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + (" with changes" if dirty.stdout else "")


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def write(path: Path, head: str, sections: Mapping[str, str], *, apart: bool) -> None:
    """Write the results; what stands by hand in the file stays.

    With ``apart`` the other parts and the head stay too; without, those that are only measured apart.
    """
    old, _, by_hand = (path.read_text() if path.exists() else "").partition(BY_HAND)
    old_head, *old_sections = old.split("\n## ")
    kept = {name: text.strip() for name, _, text in (s.partition("\n") for s in old_sections)}
    names = [part.name for part in (*PARTS, *APART)]
    if apart:
        head = old_head.strip() or head
    else:
        kept = {part.name: kept[part.name] for part in APART if part.name in kept}
    shown = {**kept, **sections}
    texts = [head, *(f"## {name}\n\n{shown[name]}" for name in names if name in shown)]
    measured = "\n\n".join(texts)
    path.write_text(f"{measured}\n\n{BY_HAND}\n\n{by_hand.strip()}".rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
