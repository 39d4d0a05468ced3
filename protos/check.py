"""Check the protos: stubs current, rules of buf kept, form, nothing released broken.

    python protos/check.py

Works without network and registry. Prints what is wrong and the command that repairs it; the exit
status is the number of checks that failed.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
BUF = str(Path(sys.executable).parent / "buf")


@dataclass(frozen=True)
class Check:
    """One command that must succeed in ``protos/``, and what to do when it does not (empty = it says so itself)."""

    command: tuple[str, ...]
    remedy: str


CHECKS = (
    Check((sys.executable, "generate.py", "--check"), ""),
    Check(
        (BUF, "lint"),
        "Change the proto, or add an exception with its reason to protos/buf.yaml.",
    ),
    Check((BUF, "format", "--diff", "--exit-code"), "Repair: make fix, then make proto"),
    Check(
        (BUF, "breaking", "--against", "released/baseline.binpb"),
        "This breaks clients: keep what is there and add. (Until 0.1.0 is released a wanted break "
        "renews the baseline in the same commit: python protos/generate.py --release)",
    ),
)


def main() -> int:
    """Run every check; return how many failed."""
    if not os.access(BUF, os.X_OK):
        print(f"{BUF} is missing: run `make check`, which installs it", file=sys.stderr)
        return 1
    failed = 0
    for check in CHECKS:
        if subprocess.run(check.command, cwd=PROTOS, check=False).returncode:
            failed += 1
            if check.remedy:
                print(check.remedy, file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
