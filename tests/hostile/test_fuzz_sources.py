"""What a hostile source answers: heads, ranges, bodies and the Hub's JSON; refused in type, or read.

The reader and the plan of the Hub run as they are, against a server on loopback that says anything.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.source import Changed
from modelhostd.adapters.wire import Limits, Transient
from modelhostd.api import convert_values, errors
from modelhostd.core import operations
from modelhostd.core.errors import REASONS, ModelhostError, Reason
from modelhostd.core.paths import path_fault
from modelhostd.core.resources import Source
from modelhostd.ports import RemoteFile
from tests.hostile.json_values import encoded
from tests.hostile.messages import mutated
from tests.hostile.profile import examples
from tests.support import DEADLINE_S

HOST = "127.0.0.1"
SOURCE = Source("hf://org/tiny")
COMMIT, SHA1, SHA256 = "c" * 40, "a" * 40, "b" * 64
SIZE = 100
FILE = RemoteFile("config.json", SIZE, "", SHA1)
BODY = b"x" * SIZE
MODEL = f"/api/models/{SOURCE.uri.removeprefix('hf://')}"
FACTS: Mapping[str, Any] = {
    "id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "private": False, "gated": False,
    "tags": ["license:mit", "x"], "pipeline_tag": "feature-extraction", "downloads": 1,
    "cardData": {"license": ["mit"], "tags": ["x"]}, "siblings": [{"rfilename": "config.json"}],
    "lastModified": "2024-01-01T00:00:00.000Z",
}  # fmt: skip
TREE = [
    {"type": "directory", "path": "sub", "oid": SHA1, "size": 0},
    {"type": "file", "path": "config.json", "oid": SHA1, "size": SIZE},
    {"type": "file", "path": "model.safetensors", "oid": SHA1, "size": 9,
     "lfs": {"oid": SHA256, "size": 9, "pointerSize": 100}},
]  # fmt: skip


@dataclass
class Site:
    """A server that answers each request with the bytes that stand for its path, and hangs up."""

    port: int
    answers: dict[str, bytes] = field(default_factory=dict)
    """By the beginning of a path; the longest that fits counts."""

    def hub(self) -> Hub:
        """Return the Hub that is this server."""
        limits = Limits(connect_s=20, stall_s=20)
        return Hub(HubConfig(endpoint=f"http://{HOST}:{self.port}", limits=limits))

    def answer(self, path: str) -> bytes:
        """Return what is said to a request for a path."""
        known = [known for known in self.answers if path.startswith(known)]
        return self.answers[max(known, key=len)] if known else reply(404)


def reply(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Make an answer that is in order."""
    said = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\n{said}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Run the server in threads."""
    listener = socket.create_server((HOST, 0))
    made = Site(listener.getsockname()[1])

    def serve(connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head and (more := connection.recv(65536)):
                head += more
            if head:
                connection.sendall(made.answer(head.split(b" ", 2)[1].decode("latin-1")))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                serve(connection)
            except ConnectionError:
                continue
            except OSError:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    yield made
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(DEADLINE_S)


LONG = b"9" * 5000  # more than int() takes


def attempt(work: Callable[[], object]) -> object:
    """Return what a piece of work comes to, or None where it is refused as it may be."""
    try:
        return work()
    except Changed:
        return None
    except Transient as failed:
        error = failed.error
    except ModelhostError as refused:
        error = refused
    assert error.reason is not Reason.INTERNAL
    assert error.metadata.keys() <= set(REASONS[error.reason].keys)
    # It becomes the error of an RPC, and of an operation in an event: both must be made of it.
    assert errors.status_of(error).message
    assert convert_values.error(operations.stored(error)).message
    return None


_digits = st.sampled_from(
    ["0", "1", "49", "50", "99", "100", "101", "-1", "9" * 25, LONG.decode(), "", "\xb2"]
)
_texts = st.one_of(
    st.sampled_from(["", " ", "*", "bytes", "\xff\xfe", "a, b", "x" * 5000, "\x0b", '"e"', 'W/"e"']),
    st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=20),
    _digits,
)  # fmt: skip
_locations = st.one_of(
    _texts,
    st.sampled_from(["/", "/x", "//", "http://", "http://[", "https://169.254.169.254/x", "file:///x",
                     "http://a:99999/", "//user:secret@127.0.0.1/", "http://127.0.0.1:1/", "\\x"]),
)  # fmt: skip
_ranges = st.one_of(
    _texts,
    st.builds("bytes {}-{}/{}".format, _digits, _digits, _digits),
    st.just(f"bytes 50-{SIZE - 1}/{SIZE}"),
)
_HEADERS: Mapping[str, st.SearchStrategy[str]] = {
    "Content-Range": _ranges,
    "Content-Length": st.one_of(st.just(str(SIZE)), st.just("50"), _digits, _texts),
    "ETag": _texts,
    "Location": _locations,
    "Retry-After": st.one_of(_texts, st.just("Fri, 31 Dec 9999 23:59:59 GMT")),
    "RateLimit": st.one_of(_texts, st.builds('"api";r=0;t={}'.format, _digits)),
    "Content-Encoding": st.one_of(st.just("identity"), st.just("gzip"), _texts),
    "Transfer-Encoding": st.one_of(st.just("chunked"), _texts),
    "Connection": st.one_of(st.just("keep-alive"), _texts),
    "X-Error-Code": st.one_of(st.sampled_from(["GatedRepo", "RepoNotFound", "EntryNotFound"]), _texts),
    "X-Error-Message": _texts,
    "X-Repo-Commit": st.one_of(st.just(COMMIT), _texts),
    "X-Linked-Etag": st.one_of(st.just(SHA256), _texts),
    "X-Linked-Size": st.one_of(st.just("9"), _digits),
    "Link": st.one_of(_texts, st.builds('<{}>; rel="next"'.format, _locations)),
}  # fmt: skip
_statuses = st.one_of(
    st.sampled_from(["200", "200", "206", "206", "301", "302", "307", "401", "403", "404", "416", "429"]),
    st.sampled_from(["500", "503", "100", "204", "304", "600", "999", "99", "0", "-1", "\xb2", "1e3", ""]),
)  # fmt: skip


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Make the head of an answer: any status, any of the headers that are read, with anything in them."""
    lines = [f"HTTP/1.1 {draw(_statuses)} X"]
    names = draw(st.lists(st.sampled_from(sorted(_HEADERS)), max_size=5))
    lines += [f"{name}: {draw(_HEADERS[name])}" for name in names]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def quiet(count: int) -> settings:
    """Return settings for examples that share a server."""
    return settings(
        max_examples=examples(count), database=None, suppress_health_check=list(HealthCheck)
    )


@quiet(300)
@given(st.sampled_from([(0, SIZE), (50, SIZE), (0, 50)]), heads(), st.binary(max_size=SIZE + 10))
@example((50, SIZE), b"HTTP/1.1 206 X\r\nContent-Range: bytes 50-99/" + LONG + b"\r\n\r\n", b"")
@example((0, SIZE), b"HTTP/1.1 429 X\r\nRetry-After: " + LONG[:60] + b"\r\n\r\n", b"")
def test_any_answer_is_the_range_that_was_asked_for_or_refused(
    site: Site, asked: tuple[int, int], head: bytes, body: bytes
) -> None:
    """Whatever the head says, no byte is taken for one at another place, and no error is untyped."""
    site.answers = {"/": head + body}
    canceller = Canceller()
    hub = site.hub()
    connections = hub.connections(canceller, SOURCE)

    def read() -> bytes:
        opened = hub.reader(connections, SOURCE, COMMIT, FILE).open(*asked)
        try:
            assert (opened.start, opened.end) in (asked, (0, SIZE))
            taken = bytearray()
            buffer = memoryview(bytearray(64))
            while count := opened.read_into(buffer):
                taken += buffer[:count]
                assert len(taken) <= len(body)
            return bytes(taken)
        finally:
            opened.close()

    try:
        attempt(read)
    finally:
        connections.close()
        canceller.cancel()


@quiet(150)
@given(
    encoded(FACTS, mutated),
    encoded(TREE, mutated),
    st.one_of(st.just(b""), heads()),
    st.booleans(),
)
@example(json.dumps(dict(FACTS)).encode(), json.dumps(TREE).encode(), b"", False)
@example(
    json.dumps({**FACTS, "cardData": "x", "tags": 5}).encode(),
    json.dumps(TREE).encode(),
    b"",
    False,
)
def test_any_plan_of_the_hub_is_safe_or_refused(
    site: Site, facts: bytes, tree: bytes, head: bytes, of_tree: bool
) -> None:
    """What comes of a listing has safe paths, sizes, digests and texts; all else is an error in type."""
    site.answers = {MODEL: reply(200, facts), f"{MODEL}/tree/": reply(200, tree)}
    if head:
        site.answers[f"{MODEL}/tree/" if of_tree else MODEL] = head + (tree if of_tree else facts)
    canceller = Canceller()
    hub = site.hub()
    connections = hub.connections(canceller, SOURCE)
    try:
        plan: Any = attempt(lambda: hub.plan(connections, SOURCE))
    finally:
        connections.close()
        canceller.cancel()
    if plan is None:
        return
    assert len(plan.revision) in (40, 64)
    for file in plan.files:
        assert not path_fault(file.path)
        assert 0 <= file.size_bytes < 1 << 50
        assert len(file.sha256) in (0, 64)
    assert all(text.isprintable() for text in (plan.task, plan.licence, *plan.tags))


def test_the_good_answers_are_good(site: Site) -> None:
    """The fuzzing begins from what works: a plan with its files, and a body."""
    site.answers = {
        MODEL: reply(200, json.dumps(dict(FACTS)).encode()),
        f"{MODEL}/tree/": reply(200, json.dumps(TREE).encode()),
        "/org/tiny/": reply(206, BODY[50:], Content_Range=f"bytes 50-{SIZE - 1}/{SIZE}"),
    }
    canceller = Canceller()
    hub = site.hub()
    connections = hub.connections(canceller, SOURCE)
    plan = hub.plan(connections, SOURCE)
    assert [file.path for file in plan.files] == ["config.json", "model.safetensors"]
    body = hub.reader(connections, SOURCE, COMMIT, FILE).open(50, SIZE)
    assert (body.start, body.end) == (50, SIZE)
    body.close()
    connections.close()
    canceller.cancel()
