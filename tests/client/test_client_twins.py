"""Both clients say the same, and the package shows tools what it shows programs."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import modelhost

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "client" / "modelhost"


def test_the_sync_client_is_the_async_one_without_asyncio() -> None:
    """What generate_sync.py would write is what is there."""
    done = subprocess.run(
        [sys.executable, ROOT / "client" / "generate_sync.py", "--check"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_check_finds_a_stale_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that differs, and one whose source is gone, make --check fail."""
    path = ROOT / "client" / "generate_sync.py"
    spec = importlib.util.spec_from_file_location("generate_sync", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("_async", "_sync"):
        (tmp_path / name).mkdir()
    (tmp_path / "_async" / "a.py").write_text("async def f():\n    await g()\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "ASYNC", tmp_path / "_async")
    monkeypatch.setattr(script, "SYNC", tmp_path / "_sync")
    assert script.main(["--check"]) == 1
    assert script.main([]) == 0
    assert (tmp_path / "_sync" / "a.py").read_text().endswith("def f():\n    g()\n")
    assert script.main(["--check"]) == 0
    (tmp_path / "_sync" / "gone.py").write_text("")
    assert script.main(["--check"]) == 1


@pytest.mark.parametrize(
    ("sync", "twin"),
    [
        ("Client", "AsyncClient"),
        ("OperationHandle", "AsyncOperationHandle"),
        ("TextStream", "AsyncTextStream"),
        ("Watch", "AsyncWatch"),
    ],
)
def test_twins_have_the_same_names_and_arguments(sync, twin) -> None:
    """Every public method of one is one of the other, with the same parameters and defaults."""

    def shape(kind: type) -> dict[str, object]:
        return {
            name: [
                (p.name, p.kind, p.default) for p in inspect.signature(member).parameters.values()
            ]
            if inspect.isfunction(member)
            else type(member)
            for name, member in inspect.getmembers(kind)
            if not name.startswith("_")
        }

    assert shape(getattr(modelhost, sync)) == shape(getattr(modelhost, twin))


def test_both_transports_have_the_same_parts() -> None:
    """The two modules that are written by hand offer the same."""
    from modelhost._async.transport import AsyncTransport
    from modelhost._sync.transport import Transport

    public = [{n for n in vars(t) if not n.startswith("_")} for t in (AsyncTransport, Transport)]
    assert public[0] == public[1]


def test_tools_see_the_names_that_programs_get() -> None:
    """The imports for type checkers, __all__ and the lazy look-up name the same things."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    shown = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*shown, "__version__"} == set(modelhost.__all__)
    assert modelhost.__all__ == sorted(modelhost.__all__)
    for name, home in shown.items():
        assert modelhost._HOMES.get(name, "modelhost._errors") == home
        assert getattr(modelhost, name) is getattr(importlib.import_module(home), name)
    assert set(modelhost.__all__) <= set(dir(modelhost))
    assert modelhost.__version__


def test_what_is_not_there_is_an_attribute_error() -> None:
    """A name that is not exported fails as with any module."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = modelhost.nothing


def test_every_public_method_is_described() -> None:
    """Each method of the client says what it does."""
    for name, member in inspect.getmembers(modelhost.Client, inspect.isfunction):
        assert name.startswith("_") or inspect.getdoc(member), name
