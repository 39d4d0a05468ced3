"""A token of the daemon's is seen by its own origin and by nobody else: not in any file, answer or process."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhost import Client, ModelhostError
from modelhost.v1 import event_service_pb2, event_service_pb2_grpc
from tests.adapters.loopback_objects import LoopbackObjects
from tests.e2e.process import Daemon

Make = Callable[..., Daemon]

HUB_TOKEN = "hf_canary_4b1d0f5e"
FILE_TOKEN = "file_canary_9c2e7a31"
S3_SECRET = "s3_canary_51d0a6c2"
GS_TOKEN = "gs_canary_e07b44f9"
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 4
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with a private repository, and one that is broken."""
    repos = {
        "org/private": Repo(FILES, private=True, readers=(HUB_TOKEN,)),
        "org/broken": Repo(FILES),
    }
    with LoopbackHub(repos, tokens=(HUB_TOKEN,)) as running:
        running.fault(Fault("*broken*", status=500, times=1000))
        yield running


def texts(process: int) -> Iterator[bytes]:
    """Yield the command line of a process and of its descendants, and their environments."""
    proc = Path("/proc") / str(process)
    yield (proc / "cmdline").read_bytes()
    for child in (proc / "task" / str(process) / "children").read_text().split():
        yield (Path("/proc") / child / "environ").read_bytes()
        yield from texts(int(child))


def events(target: str) -> str:
    """Return every event there was."""
    with grpc.insecure_channel(target) as channel:
        stub = event_service_pb2_grpc.EventServiceStub(channel)
        listed = stub.ListEvents(event_service_pb2.ListEventsRequest(page_size=1000), timeout=60)
    assert len(listed.events) > 5
    return str(listed)


@pytest.fixture
def store() -> Iterator[LoopbackObjects]:
    """Private buckets, one with a model."""
    with LoopbackObjects(secret=S3_SECRET, token=GS_TOKEN) as running:
        for path, data in FILES.items():
            running.put(f"bucket/m/{path}", data)
        yield running


def test_tokens_stay_inside(
    make_daemon: Make, hub: LoopbackHub, store: LoopbackObjects, tmp_path: Path
) -> None:
    """After a download, a load and refusals: database, logs, events, errors, answers, workers."""
    credentials = tmp_path / "credentials"
    s3 = store.url.replace("127.0.0.1", "localhost")
    lines = [f"https://files.example {FILE_TOKEN}"]
    credentials.write_text("\n".join([*lines, f"{s3} {store.access_key} {S3_SECRET}", ""]))
    credentials.chmod(0o600)
    daemon = make_daemon(
        *("--set", "worker.backends=identity", "--log-level", "debug"),
        *("--set", f"downloads.credentials={credentials}", "--set", "downloads.attempts=1"),
        *("--set", f"downloads.gs_endpoint={store.url}", "--set", f"downloads.s3_endpoint={s3}"),
        HF_ENDPOINT=hub.endpoint,
        HF_TOKEN=HUB_TOKEN,
        GOOGLE_OAUTH_ACCESS_TOKEN=GS_TOKEN,
    )
    told: list[str] = []
    with daemon, Client(daemon.target) as client:
        client.add("hf://org/private", "m", config={"backend": "identity"})
        client.pull("m")
        client.load("m")
        for scheme in ("s3", "gs"):
            client.pull(f"{scheme}://bucket/m", f"{scheme}-m")
        for source in (
            *("hf://org/broken", "hf://org/missing", "https://127.0.0.1/x.gguf"),
            *("s3://bucket/missing", "gs://bucket/missing", "s3://missing/x", "gs://missing/x"),
        ):
            with pytest.raises(ModelhostError) as caught:
                client.inspect(source)
            told += [str(caught.value), repr(caught.value), repr(vars(caught.value))]
        client.add("hf://org/broken", "b")
        with pytest.raises(ModelhostError) as caught:
            client.pull("b")
        told.append(repr(vars(caught.value)))
        host = client.host()
        told += [str(host), str(list(client.models())), client.export_registry().decode()]
        told.append(events(daemon.target))
        told += [text.decode(errors="replace") for text in texts(daemon.pid)]
        assert len(list(texts(daemon.pid))) > 1, "no worker was looked at"
        shown = {c.origin: (c.kept_in, c.state) for c in host.credentials}
    # The hub got it, or this test would prove nothing.
    assert f"Bearer {HUB_TOKEN}" in {r.headers.get("authorization") for r in hub.requests}
    accepted = host.credentials[0].ACCEPTED
    assert shown[hub.endpoint] == ("HF_TOKEN", accepted)
    assert shown["https://files.example"][0] == str(credentials)
    assert {r.headers.get("authorization") for r in store.requests if "/storage/" in r.path} == {
        f"Bearer {GS_TOKEN}"
    }
    assert shown[s3][1] == shown[store.url][1] == accepted
    told.append(daemon.log)
    for path in daemon.root.rglob("*"):
        if path.is_file() and os.access(path, os.R_OK):
            told.append(path.read_bytes().decode(errors="replace"))
    for token in (HUB_TOKEN, FILE_TOKEN, S3_SECRET, GS_TOKEN):
        assert not [text for text in told if token in text]
