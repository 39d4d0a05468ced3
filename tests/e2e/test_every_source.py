"""Each kind of source through a whole daemon: looked at, pulled, shown."""

import hashlib
import json
from collections.abc import Callable, Iterator

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhost import Client, ModelhostError
from tests import gguf
from tests.adapters.loopback_objects import LoopbackObjects
from tests.adapters.loopback_site import LoopbackSite, Page
from tests.e2e.process import Daemon

Make = Callable[..., Daemon]

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 4
GGUF = gguf.model(bytes(100))


@pytest.fixture
def site() -> Iterator[LoopbackSite]:
    """A web server, an API of GitHub's kind and a registry of Ollama's in one."""

    def digest(data: bytes) -> str:
        return f"sha256:{hashlib.sha256(data).hexdigest()}"

    with LoopbackSite() as site:
        site.pages["/m/a.safetensors"] = Page(WEIGHTS)
        asset = {"id": 1, "name": "b.gguf", "size": len(GGUF), "state": "uploaded"}
        release = {"tag_name": "v1", "assets": [{**asset, "digest": digest(GGUF)}]}
        site.pages["/repos/org/b/releases/latest"] = Page(json.dumps(release).encode())
        site.pages["/org/b/releases/download/v1/b.gguf"] = Page(GGUF)
        layer = {"mediaType": "application/vnd.ollama.image.model", "size": len(GGUF)}
        manifest = {"schemaVersion": 2, "layers": [{**layer, "digest": digest(GGUF)}]}
        site.pages["/v2/library/c/manifests/8b"] = Page(json.dumps(manifest).encode())
        site.pages[f"/v2/library/c/blobs/{digest(GGUF)}"] = Page(GGUF)
        yield site


def test_every_kind_of_source_is_looked_at_and_pulled(
    make_daemon: Make, site: LoopbackSite
) -> None:
    """What InspectSource shows is what ListModelFiles has afterwards; what is not allowed is said."""
    checksum = hashlib.sha256(WEIGHTS).hexdigest()
    repo = Repo({"config.json": b"{}", "model.safetensors": WEIGHTS})
    with LoopbackHub({"org/d": repo}) as hub, LoopbackObjects() as store:
        store.put("bucket/f/model.safetensors", WEIGHTS)
        daemon = make_daemon(
            *("--set", f"downloads.github_endpoint={site.url}"),
            *("--set", f"downloads.ollama_endpoint={site.url}"),
            *("--set", f"downloads.s3_endpoint={store.url}"),
            *("--set", f"downloads.gs_endpoint={store.url}"),
            *("--set", "downloads.http_hosts=127.0.0.1"),
            *("--set", "downloads.private_hosts=127.0.0.1"),
            *("--set", "worker.backends=identity"),
            HF_ENDPOINT="http://127.0.0.1:9",
            MODELHOST_DOWNLOADS_MIRRORS=hub.endpoint,
        )
        folder = daemon.root / "models" / "e"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        daemon.flags = (*daemon.flags, "--set", f"downloads.file_roots={folder.parent}")
        wanted = {
            f"{site.url}/m/a.safetensors#sha256={checksum}": {"a.safetensors"},
            "github://org/b": {"b.gguf"},
            "ollama://c:8b": {"c.gguf"},
            "hf://org/d": {"config.json", "model.safetensors"},
            f"file://{folder}": {"model.safetensors"},
            "s3://bucket/f": {"model.safetensors"},
            "gs://bucket/f/model.safetensors": {"model.safetensors"},
        }
        with daemon, Client(daemon.target) as client:
            for number, (source, files) in enumerate(wanted.items()):
                seen = client.inspect(source)
                assert {file.path for file in seen.files} == files, source
                client.add(source, f"m{number}", config={"backend": "identity"})
                client.pull(f"m{number}")
                assert {file.path for file in client.files(f"m{number}")} == files, source
                client.load(f"m{number}")
            with pytest.raises(ModelhostError) as caught:
                client.inspect("http://localhost/x.gguf")
            assert caught.value.reason == "SOURCE_NOT_ALLOWED"
            assert caught.value.metadata["setting"] == "downloads.http_hosts"
            states = {one.scheme: one.state for one in client.host().sources}
    assert {scheme for scheme, state in states.items() if state == 2} >= {
        *("hf", "https", "github", "ollama", "file", "s3", "gs")
    }
