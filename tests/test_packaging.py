"""What is installed: floors that agree with the stubs, a light client, a wheel that holds it all."""

import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = runpy.run_path(str(ROOT / PROJECT["tool"]["hatch"]["version"]["path"]))["__version__"]
STUBS = [
    *(ROOT / "client" / "modelhost").rglob("*_pb2*.py"),
    *(ROOT / "server" / "modelhostd").rglob("*_pb2*.py"),
]

HEAVY = ("torch", "transformers", "numpy", "grpc", "google.protobuf", "modelhostd", "rich", "click")


def requirements(*lists: list[str]) -> dict[str, Requirement]:
    """Return the requirements of ``lists`` by name."""
    return {r.name: r for line in lists for r in map(Requirement, line)}


def floor(requirement: Requirement) -> Version:
    """Return the oldest version that a requirement allows."""
    return max(Version(s.version) for s in requirement.specifier if s.operator in {">=", "=="})


def run_python(code: str, *options: str) -> str:
    """Run ``code`` in a new interpreter and return its output; its errors end the test."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd="/", check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- versions -----------------------------------------------------------------------------------------


def test_the_floors_are_what_the_stubs_were_generated_for() -> None:
    """The oldest protobuf and grpcio that pyproject allows are the ones that the stubs ask for."""
    protobuf, grpcio = set(), set()
    for stub in STUBS:
        text = stub.read_text()
        for found in re.findall(r"Domain\.PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+),", text):
            protobuf.add(Version(".".join(found)))
        grpcio.update(map(Version, re.findall(r"GRPC_GENERATED_VERSION = '([^']+)'", text)))
    base = requirements(PROJECT["project"]["dependencies"])
    assert protobuf == {floor(base["protobuf"])}, "make proto, or change the floor of protobuf"
    assert grpcio == {floor(base["grpcio"])}, "make proto, or change the floor of grpcio"


def test_the_generator_is_pinned_to_the_floor() -> None:
    """grpcio-tools is pinned, in pyproject and in the constraints, to the floor of grpcio."""
    pinned = requirements(PROJECT["dependency-groups"]["dev"])["grpcio-tools"]
    base = requirements(PROJECT["project"]["dependencies"])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert {s.operator for s in pinned.specifier} == {"=="}
    assert floor(pinned).release[:2] == floor(base["grpcio"]).release[:2]
    assert f"grpcio-tools=={floor(pinned)}" in lines


def test_every_dependency_has_a_pin_that_it_allows() -> None:
    """constraints.txt names a version for each direct dependency, inside the bounds of pyproject."""
    pins = requirements(
        [
            line.partition(" ;")[0]
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line and not line.startswith("#")
        ]
    )
    pins = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    direct = requirements(
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
        PROJECT["dependency-groups"]["dev"],
    )
    for name, requirement in direct.items():
        pin = pins.get(name.lower().replace("_", "-"))
        assert pin is not None, (
            f"{name} has no line in constraints.txt; its header says how to make it"
        )
        assert requirement.specifier.contains(floor(pin), prereleases=True), (name, pin)


# --- what an import pulls in ------------------------------------------------------------------------------


def test_importing_the_client_is_light() -> None:
    """`import modelhost` loads neither torch, numpy, grpc nor any part of the daemon."""
    code = f"import sys, modelhost; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    assert run_python(code).split() == []


def test_importing_the_daemon_loads_no_torch() -> None:
    """The daemon's process holds neither torch nor numpy once all of it is imported."""
    code = (
        "import sys, modelhostd.daemon;"
        "print(*(m for m in ('torch', 'transformers', 'numpy') if m in sys.modules))"
    )
    assert run_python(code).split() == []


def test_the_client_needs_no_extra() -> None:
    """Client and command line import where nothing but the base dependencies can be imported."""
    extras = PROJECT["project"]["optional-dependencies"]
    names = {r.replace("-", "_") for r in requirements(extras["server"], extras["torch"])}
    names = names - {"grpcio_health_checking", "grpcio_reflection"} | {
        "grpc_health",
        "grpc_reflection",
    }
    names = names - {"nvidia_ml_py"} | {"pynvml", "modelhostd"}
    code = (
        "import sys\n"
        f"for name in {sorted(names)!r}: sys.modules[name] = None\n"  # None: importing it fails
        "import modelhost, modelhost.cli, modelhost.v1\n"
        "for name in modelhost.__all__: getattr(modelhost, name)\n"
    )
    run_python(code)


@pytest.mark.parametrize("command", ["modelhost", "modelhostd"])
def test_the_commands_are_installed(command: str) -> None:
    """Both commands start from their installed entry points and print their version."""
    done = subprocess.run(
        [Path(sys.executable).with_name(command), "--version"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert VERSION in done.stdout


# --- the wheel --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the wheel and return the names of its files."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_is_typed(wheel: set[str]) -> None:
    """Both packages carry py.typed and the stubs of what was generated."""
    assert {"modelhost/py.typed", "modelhostd/py.typed"} <= wheel
    for name in wheel:
        if name.endswith("_pb2.py"):
            assert name + "i" in wheel


def test_the_wheel_holds_the_contract(wheel: set[str]) -> None:
    """Every public proto travels with the wheel, the private ones do not."""
    public = {
        str(p.relative_to(ROOT / "protos"))
        for p in (ROOT / "protos" / "modelhost").rglob("*.proto")
    }
    shared = {
        name.split("/share/modelhost/protos/")[1] for name in wheel if name.endswith(".proto")
    }
    assert public
    assert shared == public


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    """No tests, caches or foreign packages: two packages, the protos and the metadata."""
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {
        "modelhost",
        "modelhostd",
        f"modelhost-{VERSION}.data",
        f"modelhost-{VERSION}.dist-info",
    }
    assert not [n for n in wheel if "__pycache__" in n or ".cache" in n or n.endswith(".db")]


def test_the_wheel_names_its_licence(wheel: set[str]) -> None:
    """The licence's text is inside."""
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
