"""What models say of themselves is run as it is written: the examples of each task, and `modelhost run`."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from bench.models import make_classifier, minilm_dir
from modelhost import Client, InvalidArgument
from tests.e2e.process import Daemon
from tests.support import free_port
from tests.worker.generation_models import save_model

pytestmark = pytest.mark.timeout(720)

BIN = Path(sys.executable).parent
RUN_S, LOAD_S = 300, 280.0
"""The first load imports a library: on one core beside much other work 120 s, as usual, were not enough."""
MODELS = {
    "minilm": "feature-extraction",
    "mood": "text-classification",
    "writer": "text-generation",
    "any": "depth-estimation",
}
SAYS = {
    "minilm": ("(2, 384) float32", "[["),
    "mood": ("0.", "b'"),
    "writer": ("", "b'"),
    "any": ("x float32 (1, 4)", "[[0. 0. 0. 0.]]"),
}
"""A part of what the example with the client, and the one with tritonclient, write."""


@pytest.fixture
def served(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[tuple[Daemon, str]]:
    """A daemon with a model of each task on disk, and its address."""
    (tmp_path / "writer").mkdir()
    save_model(tmp_path / "writer")
    make_classifier(tmp_path / "mood")
    folders = {
        "minilm": minilm_dir(),
        "mood": tmp_path / "mood",
        "writer": tmp_path / "writer",
        "any": tmp_path / "mood",
    }
    repos = {
        f"org/{name}": Repo.from_folder(folder, pipeline_tag=MODELS[name], licence="mit")
        for name, folder in folders.items()
    }
    address = f"127.0.0.1:{free_port()}"
    with LoopbackHub(repos) as hub:
        daemon = make_daemon("--grpc", address, HF_ENDPOINT=hub.endpoint)
        with daemon, Client(daemon.target) as client:
            for name in MODELS:
                config: dict[str, object] = {"load_timeout": LOAD_S}
                if name == "any":
                    config["backend"] = "identity"
                client.add(f"hf://org/{name}", name, config=config)
                client.pull(f"hf://org/{name}", name=name)
            yield daemon, address


def done(arguments: list[str], target: str, **options: str) -> str:
    """Return what a program writes, which must end well."""
    environment = {**os.environ, "MODELHOST_TARGET": target, "PATH": f"{BIN}:{os.environ['PATH']}"}
    ended = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False, **options
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_what_models_say_of_themselves_works(served: tuple[Daemon, str]) -> None:
    """The examples of a model of each task run as they are, and `run` does the right thing for each."""
    daemon, address = served
    target = daemon.target
    for model in MODELS:
        shown = json.loads(done(["modelhost", "show", model, "--usage", "--json"], target))
        examples = {one["tool"]: one["text"] for one in shown["usage"]["examples"]}
        assert address in examples["tritonclient"]
        for tool, says in zip(("python", "tritonclient"), SAYS[model], strict=True):
            written = done([sys.executable, "-c", examples[tool]], target)
            assert says in written, (model, tool)
        answer = done(shlex.split(examples["buf curl"].replace("\\\n", " ")), target)
        assert answer.startswith("{"), answer

    lines = done(["modelhost", "run", "minilm", "one", "two"], target).splitlines()
    assert [len(json.loads(line)) for line in lines] == [384, 384]
    labels = done(["modelhost", "run", "mood", "fine", "--top-k", "2"], target).splitlines()
    assert len(labels) == 2
    assert labels[0].split("\t")[1] in ("calm", "neutral", "lively")
    written = ["modelhost", "run", "writer", "hello", "-p", "max_tokens=4", "--json"]
    told = json.loads(done(written, target))
    # A message goes through the template, which makes it longer than its five letters.
    assert told["inputTokens"] > 5
    assert told["outputTokens"] <= 4
    raw = json.loads(done([*written, "--raw"], target))
    assert raw["inputTokens"] == 5

    with Client(target) as client:
        pieces = client.generate("writer", "hello", stream=True, max_tokens=4)
        assert "".join(pieces) == client.generate("writer", "hello", max_tokens=4).text
        for bad, named in (
            ({"max_tokens": 0}, "max_tokens"),
            ({"temperature": float("nan")}, "temperature"),
            ({"stop": [""]}, "stop"),
        ):
            with pytest.raises(InvalidArgument, match=named):
                client.generate("writer", "hello", **bad)
        with pytest.raises(InvalidArgument, match="prompt"):
            client.generate("writer", "x" * 500)
        with pytest.raises(InvalidArgument, match="call Embed"):
            client.generate("minilm", "hello")
        (found,) = client.classify("mood", ["fine"])
        assert sum(one.score for one in found.labels) == pytest.approx(1, abs=1e-5)
