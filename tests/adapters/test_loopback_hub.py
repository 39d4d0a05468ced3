"""The loopback Hub itself: the library that the real Hub serves must find nothing odd about it."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from bench.loopback_hub import LoopbackHub, Repo, git_oid
from bench.models import minilm_dir
from modelhostd.core.tasks import task_of

ROOT = Path(__file__).resolve().parents[2]

CLIENT = """
import sys
from huggingface_hub import HfApi, snapshot_download
endpoint, cache, repo = sys.argv[1:]
info = HfApi(endpoint=endpoint, token=False).model_info(repo, files_metadata=False)
print(info.sha, info.pipeline_tag)
print(snapshot_download(repo, endpoint=endpoint, cache_dir=cache, token=False))
"""


def test_git_names_blobs_as_git_does() -> None:
    """The oid of an empty blob and of a known text."""
    assert git_oid(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_the_librarys_own_download_works_against_it(tmp_path: Path) -> None:
    """Info, tree, HEAD, LFS redirect and bytes, by an unchanged huggingface_hub in a process of its
    own, with paging.
    """
    files = {"config.json": b"{}", "a/b.txt": b"text", "model.safetensors": os.urandom(300_000)}
    with LoopbackHub({"org/tiny": Repo(files, pipeline_tag="fill-mask")}, page_size=2) as hub:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, hub.endpoint, str(tmp_path / "cache"), "org/tiny"],
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
            env={**os.environ, "HF_HUB_DISABLE_XET": "1"},
        )
    first, folder = done.stdout.split("\n")[:2]
    assert first == f"{hub.repos['org/tiny'].head} fill-mask"
    assert {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*.*")} == files


def test_a_folders_card_says_what_the_model_is(tmp_path: Path) -> None:
    """Without options task, tags and licence come from README.md, as on the Hub; options win."""
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\npipeline_tag: sentence-similarity\ntags:\n- bert\n---\n# A model\n"
    )
    carded = Repo.from_folder(tmp_path)
    assert (carded.pipeline_tag, carded.licence) == ("sentence-similarity", "mit")
    assert carded.tags == ("bert", "license:mit")
    assert Repo.from_folder(tmp_path, pipeline_tag="fill-mask").pipeline_tag == "fill-mask"
    (tmp_path / "README.md").write_text("# A card without metadata\n")
    assert Repo.from_folder(tmp_path).pipeline_tag == ""


def test_the_real_models_folder_is_served_as_what_it_is() -> None:
    """The README's command for a folder gives a model that a backend serves, without saying its task."""
    repo = Repo.from_folder(minilm_dir())
    assert task_of(repo.pipeline_tag, repo.tags) == "feature-extraction"


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    """Folders become repositories; it prints where it is and ends on a signal."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    program = [sys.executable, str(ROOT / "bench" / "loopback_hub.py")]
    with subprocess.Popen(
        [*program, "--repo", f"org/name={tmp_path / 'model'}", "--task", "fill-mask"],
        stdout=subprocess.PIPE,
        text=True,
    ) as hub:
        assert hub.stdout is not None
        endpoint = hub.stdout.readline().strip().removeprefix("HF_ENDPOINT=")
        with urlopen(f"{endpoint}/org/name/resolve/main/config.json", timeout=60) as reply:
            assert reply.read() == b"{}"
            assert reply.headers["ETag"] == f'"{git_oid(b"{}")}"'
        hub.send_signal(signal.SIGINT)
        assert hub.wait(60) == 0


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [("bytes=0-9", 206, 0, 10), ("bytes=90-", 206, 90, 100), ("bytes=5-500", 206, 5, 100)],
)
def test_ranges_are_served_exactly(asked: str, status: int, start: int, end: int) -> None:
    """Content-Range and length, as a CDN answers."""
    import http.client

    data = bytes(range(100))
    with LoopbackHub({"org/tiny": Repo({"x.safetensors": data})}) as hub:
        host = hub.cdn.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        path = f"/{hashlib.sha256(data).hexdigest()}?signature=1"
        connection.request("GET", path, headers={"Range": asked})
        reply = connection.getresponse()
        assert reply.status == status
        assert reply.headers["Content-Range"] == f"bytes {start}-{end - 1}/100"
        assert reply.read() == data[start:end]
        connection.request("GET", path, headers={"Range": "bytes=100-"})
        assert connection.getresponse().status == 416
        connection.close()
