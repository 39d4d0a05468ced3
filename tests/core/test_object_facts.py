"""What object stores tell of an object: paths below a prefix, and digests that are digests of the content."""

import base64
import hashlib

import pytest

from modelhostd.core.object_facts import below, gs_digest, s3_digest

DATA = b"weights"
MD5 = hashlib.md5(DATA).hexdigest()
SHA256 = hashlib.sha256(DATA)
SHA1 = hashlib.sha1(DATA)


def b64(data: bytes) -> str:
    """Return base64 as text."""
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("name", "prefix", "path"),
    [
        ("b/models/x/a.txt", "b/models/x", "a.txt"),
        ("b/models/x/n/a.txt", "b/models/x", "n/a.txt"),
        ("b/models/x", "b/models/x", "x"),
        ("b/models/x/", "b/models/x", ""),
        ("b/models/x/n/", "b/models/x", ""),
        ("b/models/xy/a.txt", "b/models/x", ""),
        ("b/other", "b/models/x", ""),
    ],
)
def test_paths_are_below_the_prefix(name: str, prefix: str, path: str) -> None:
    """What begins alike but for the slash is another folder; markers of folders are no files."""
    assert below(name, prefix) == path


@pytest.mark.parametrize(
    ("head", "digest"),
    [
        ({"ETag": f'"{MD5}"'}, f"md5:{MD5}"),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "AES256"}, f"md5:{MD5}"),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms"}, ""),
        ({"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256"}, ""),
        ({"ETag": f'"{MD5}-7"'}, ""),
        ({"ETag": '"other"'}, ""),
        ({}, ""),
        (
            {"ETag": f'"{MD5}"', "ChecksumSHA256": b64(SHA256.digest())},
            f"sha256:{SHA256.hexdigest()}",
        ),
        ({"ETag": '"x-2"', "ChecksumSHA1": b64(SHA1.digest())}, f"sha1:{SHA1.hexdigest()}"),
        ({"ChecksumSHA256": b64(SHA256.digest()), "ChecksumType": "COMPOSITE"}, ""),
        ({"ChecksumSHA256": b64(SHA256.digest()) + "-3"}, ""),
        ({"ChecksumSHA256": b64(b"short")}, ""),
    ],
)
def test_s3_tells_a_digest_of_the_content_or_none(head: dict[str, str], digest: str) -> None:
    """Digests of parts and ETags of encrypted objects are none."""
    assert s3_digest(head, "bucket") == digest


def test_an_etag_of_a_directory_bucket_is_no_digest() -> None:
    """It looks like one."""
    assert s3_digest({"ETag": f'"{MD5}"'}, "b--use1-az4--x-s3") == ""


@pytest.mark.parametrize("told", [None, 7, "", "!", b64(b"short")])
def test_google_tells_an_md5_or_none(told: object) -> None:
    """Objects made of parts have a CRC32C alone."""
    assert gs_digest({"md5Hash": b64(hashlib.md5(DATA).digest())}) == f"md5:{MD5}"
    assert gs_digest({"md5Hash": told}) == gs_digest({"crc32c": told}) == ""
    assert gs_digest({"md5Hash": told, "crc32c": b64(b"\1\2\3\4")}) == "crc32c:01020304"
