"""The house's style as tests; the checks themselves are in ``tidy.py``."""

from collections.abc import Iterable
from pathlib import PurePosixPath

import pytest

from tests.tidy import (
    CHECKS,
    ROOT,
    banned_calls,
    forbidden_words,
    long_files,
    long_functions,
    nameless_tests,
    parsed,
    paths,
    prints,
    silent_handlers,
    sleeping_tests,
    sources,
    subscripted_grpc,
    torch_outside_worker,
)

# Everything that may stand at the top of the repository: a newcomer reads this list first.
TOP = {
    *(".ci", ".gitattributes", ".gitignore", "Makefile", "constraints.txt", "pyproject.toml"),
    *("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"),
    *("bench", "client", "examples", "protos", "server", "systemd", "tests"),
}


def report(found: Iterable[str]) -> None:
    lines = list(found)
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


# --- the tree ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_tree_is_tidy(check) -> None:
    """Every Python file of the project passes every check."""
    report(f"{s.path}:{line}" for s in sources() for line in check(s))


def test_no_file_names_a_registry_or_a_machine() -> None:
    """No text file carries a registry's address, a path of one machine or a merge conflict."""
    found = []
    for path in paths():
        content = (ROOT / path).read_bytes()
        if b"\0" not in content:
            found += [f"{path}:{line}" for line in forbidden_words(content.decode())]
    report(found)


def test_the_top_of_the_repository_is_short() -> None:
    """Nothing stands at the top but what the design names."""
    report(
        f"{name}: not expected at the top of the repository; put it in the folder it belongs to"
        for name in sorted({PurePosixPath(p).parts[0] for p in paths()} - TOP)
    )


def test_test_files_have_names_of_their_own() -> None:
    """No two test files share a name, so that one can be asked for by its name."""
    seen: dict[str, str] = {}
    found = []
    for path in paths():
        name = PurePosixPath(path).name
        if name.startswith("test_") and name.endswith(".py"):
            if name in seen:
                found.append(f"{path}: {seen[name]} has the same name; rename one")
            seen[name] = path
    report(found)


# --- the checks themselves --------------------------------------------------------------------------

PLANTED = [
    (long_files, "server/a.py", "x = 1\n" * 401),
    (long_functions, "server/a.py", "def f():\n" + "    x = 1\n" * 101),
    (banned_calls, "server/a.py", "from time import sleep as s\ns(1)\n"),
    (banned_calls, "client/a.py", "import pickle as p\np.loads(b'')\n"),
    (banned_calls, "server/a.py", "import torch\ntorch.load('x')\n"),
    (banned_calls, "server/a.py", "load('x', weights_only=False)\n"),
    (banned_calls, "server/a.py", "AutoModel.from_pretrained('x', trust_remote_code=True)\n"),
    (silent_handlers, "server/a.py", "try:\n    f()\nexcept Exception:\n    pass\n"),
    (silent_handlers, "server/a.py", "try:\n    f()\nexcept (OSError, BaseException):\n    ...\n"),
    (silent_handlers, "server/a.py", "with contextlib.suppress(Exception):\n    f()\n"),
    (prints, "server/modelhostd/api/a.py", "print('x')\n"),
    (
        torch_outside_worker,
        "server/modelhostd/api/a.py",
        "def f():\n    from torch.nn import Module\n",
    ),
    (nameless_tests, "tests/a.py", "async def test_x():\n    assert True\n"),
    (sleeping_tests, "tests/a.py", "import time\ntime.sleep(1)\n"),
    (
        sleeping_tests,
        "tests/a.py",
        "from asyncio import sleep\nasync def f():\n    await sleep(0.1)\n",
    ),
    (
        subscripted_grpc,
        "client/a.py",
        "def f(x: grpc.aio.StreamUnaryMultiCallable[int, int]):\n    pass\n",
    ),
]
INNOCENT = [
    (
        subscripted_grpc,
        "client/a.py",
        'def f(x: "grpc.aio.StreamUnaryMultiCallable[int, int]"):\n    pass\n',
    ),
    (banned_calls, "tests/a.py", "import time\ntime.sleep(1)\n"),
    (banned_calls, "server/a.py", "load('x', weights_only=True, trust_remote_code=False)\n"),
    (silent_handlers, "server/a.py", "try:\n    f()\nexcept OSError:\n    pass\n"),
    (prints, "client/modelhost/cli/a.py", "print('x')\n"),
    (torch_outside_worker, "server/modelhostd/worker/a.py", "import torch\n"),
    (sleeping_tests, "tests/a.py", "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n"),
]


@pytest.mark.parametrize(
    ("check", "path", "text"),
    PLANTED,
    ids=[f"{c.__name__}-{i}" for i, (c, *_) in enumerate(PLANTED)],
)
def test_each_check_finds_what_it_is_for(check, path: str, text: str) -> None:
    """A planted offence is found, once."""
    assert len(list(check(parsed(path, text)))) == 1


@pytest.mark.parametrize(
    ("check", "path", "text"),
    INNOCENT,
    ids=[f"{c.__name__}-{i}" for i, (c, *_) in enumerate(INNOCENT)],
)
def test_no_check_accuses_the_innocent(check, path: str, text: str) -> None:
    """What looks like an offence and is none passes."""
    assert list(check(parsed(path, text))) == []


def test_forbidden_words_are_found() -> None:
    """The search for words finds a registry, a machine's path and a conflict, and spares a URL."""
    text = "\n".join(
        ["see https://" + "pypi" + ".org/p", "in " + "/root" + "/x", "<" * 7 + " HEAD", "a/root/x"]
    )
    assert [line.split(":")[0] for line in forbidden_words(text)] == ["1", "2", "3"]
