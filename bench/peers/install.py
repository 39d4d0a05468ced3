"""Makes a virtual environment for each peer of the inference benches: ``make bench-peers`` runs it.

They lie below ``.cache/peers``, never in the project's own environment, with the versions of torch and
transformers that the project's own has. Minutes and about 3 GB; what is there already is kept.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PEERS = Path(__file__).resolve().parents[2] / ".cache" / "peers"
WANTED = {
    "triton": ("nvidia-pytriton==0.7.0",),
    # Its workers do not start with a newer uvloop, which makes no loop unasked.
    "mlserver": ("mlserver==1.7.1", "uvloop==0.21.0"),
}
"""By environment: the packages of the server. tritonserver is a binary inside of pytriton."""
SHARED = ("transformers", "tokenizers", "safetensors")
STUB = "triton_python_backend_stub"


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--pip", default="", help="options for every pip call")
    options = shlex.split(parser.parse_args().pip)
    for name, packages in WANTED.items():
        wanted = " ".join((*packages, pin("torch"), *map(pin, SHARED)))
        if (ready := PEERS / name / ".ready").exists() and ready.read_text() == wanted:
            continue
        print(f"peers: {wanted} into {PEERS / name}", flush=True)
        venv.create(PEERS / name, with_pip=True, clear=True)
        # torch first and by itself, as in the project's own set-up: else pip may take another build of it.
        pip(name, options, pin("torch"))
        pip(name, options, *packages, *map(pin, SHARED))
        if name == "triton":
            shutil.copy2(stub(), triton() / "backends" / "python" / STUB)
        ready.write_text(wanted)


def pip(name: str, options: Sequence[str], *packages: str) -> None:
    """Install packages into a peer's environment."""
    command = [str(python(name)), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*command, *options, "install", *packages], check=True)


def pin(package: str) -> str:
    """Return the version that the project's own environment has, without its local part (``+cpu``)."""
    return f"{package}=={metadata.version(package).partition('+')[0]}"


def python(name: str) -> Path:
    """Return the interpreter of a peer's environment."""
    return PEERS / name / "bin" / "python"


def installed(name: str) -> bool:
    """Whether a peer is there, whole."""
    return (PEERS / name / ".ready").exists()


def triton() -> Path:
    """Return the folder that has tritonserver's ``bin`` and ``backends``."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return PEERS / "triton" / "lib" / version / "site-packages" / "pytriton" / "tritonserver"


def stub() -> Path:
    """Return the program that runs Python models, for this Python: its backend looks for it beside itself."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return triton() / "python_backend_stubs" / version / STUB


if __name__ == "__main__":
    main()
