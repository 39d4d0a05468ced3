"""A file's digest, whatever order its bytes come in and however many write them."""

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.hashing import Digests, Hasher, HashThread
from modelhostd.adapters.parts import Part
from modelhostd.core.spans import Span
from modelhostd.ports import RemoteFile
from tests.support import wait_until

DATA = random.Random(7).randbytes(1_000_003)
SHA256 = hashlib.sha256(DATA).hexdigest()
FILE = RemoteFile("model.safetensors", len(DATA), sha256=SHA256)
BUFFER = 4096


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Part]:
    """An empty part of a file of one megabyte."""
    store = BlobStore(StoreConfig(tmp_path))
    with store.open_part(SHA256, len(DATA), "test") as part:
        yield part
    store.close()


def writer(part: Part, hashing: HashThread, pieces: list[Span]) -> Callable[[], None]:
    """Return what one connection does: fill a buffer, write it, hand it over, fill the next."""

    def write() -> None:
        buffer = memoryview(bytearray(BUFFER))
        for start, end in pieces:
            for offset in range(start, end, BUFFER):
                count = min(BUFFER, end - offset)
                buffer[:count] = DATA[offset : offset + count]
                part.write(offset, buffer[:count])
                buffer = hashing.swap(offset, buffer, count)

    return write


@pytest.mark.parametrize("writers", [1, 2, 5])
def test_a_digest_is_right_whatever_order_pieces_come_in(part: Part, writers: int) -> None:
    """Several writers take pieces in any order, reuse their buffers at once, and every byte is hashed in its turn."""
    failures: list[BaseException] = []
    digests = Digests(FILE)
    hasher = Hasher(part, digests, lambda: None)
    hashing = HashThread(hasher, part, failures.append)
    hashing.start(memoryview(bytearray(BUFFER)))
    pieces = [(at, min(at + 50_000, len(DATA))) for at in range(0, len(DATA), 50_000)]
    if writers > 1:
        random.Random(writers).shuffle(pieces)
    threads = [
        threading.Thread(target=writer(part, hashing, pieces[n::writers])) for n in range(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hashing.stop()
    hasher.catch_up(len(DATA))
    assert (digests.sha256, failures) == (SHA256, [])


def test_what_lies_behind_a_closed_gap_is_hashed_without_another_word(part: Part) -> None:
    """Bytes that came before their turn are hashed when the gap before them is closed, though nobody hands them over."""
    hasher = Hasher(part, Digests(FILE), lambda: None)
    hashing = HashThread(hasher, part, lambda _: None)
    hashing.start(memoryview(bytearray(BUFFER)))
    part.write(BUFFER, memoryview(DATA)[BUFFER:])
    part.write(0, memoryview(DATA)[:BUFFER])
    wait_until(lambda: hasher.position == len(DATA))
    hashing.stop()


def test_a_disk_that_cannot_be_read_fails_the_hashing_and_holds_up_no_writer(part: Part) -> None:
    """The failure is told, and writers go on with the buffers they have."""
    failures: list[BaseException] = []
    hashing = HashThread(Hasher(part, Digests(FILE), lambda: None), part, failures.append)
    hashing.start(memoryview(bytearray(BUFFER)))
    part.write(0, memoryview(DATA))
    os.ftruncate(part.fd, 0)
    wait_until(lambda: failures)
    hashing.stop()
    buffer = memoryview(bytearray(BUFFER))
    for offset in range(0, 10 * BUFFER, BUFFER):
        assert hashing.swap(offset, buffer, BUFFER) is buffer
    assert isinstance(failures[0], OSError)
