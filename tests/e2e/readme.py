"""The README's blocks of code, as a reader would copy them."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent.parent / "README.md"
_BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str = "") -> list[str]:
    """Return the blocks of one language, in order."""
    found = _BLOCK.finditer(README.read_text())
    return [match["code"] for match in found if match["language"] == language]


def commands(program: str) -> list[str]:
    """Return the commands that begin with ``program``, continued lines joined, comments dropped."""
    lines = "\n".join(blocks()).replace("\\\n", " ").splitlines()
    found = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return [line for line in found if line.split(" ")[0] == program]
