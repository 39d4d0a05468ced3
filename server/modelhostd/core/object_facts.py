"""What object stores tell of an object: its path below what was asked for, and a digest where there is one.

S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
GCS: https://cloud.google.com/storage/docs/json_api/v1/objects#resource
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

_HEX = re.compile(r"[0-9a-f]{32}")
_DIGEST_BYTES = {"sha256": 32, "sha1": 20, "md5": 16, "crc32c": 4}
DIRECTORY_BUCKET = "--x-s3"
"""The end of the names of S3's directory buckets, whose ETags are no digests."""


def below(name: str, prefix: str) -> str:
    """Return the path of an object below ``prefix``; its last segment where it is the prefix itself.

    Empty for what stands for a folder, and for what is not below. Names are ``bucket/key``.
    """
    if name == prefix:
        return name.rpartition("/")[2]
    folder = f"{prefix}/"
    return "" if name.endswith("/") or not name.startswith(folder) else name[len(folder) :]


def s3_digest(head: Mapping[str, Any], bucket: str) -> str:
    """Return ``kind:digits`` of the object's content from the answer to HeadObject; or nothing.

    A checksum of checksums (of an upload in parts) says nothing of the content; an ETag is its MD5
    unless it was uploaded in parts, or is encrypted with a key of KMS or of the customer.
    """
    if head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
        for kind in ("sha256", "sha1"):
            if digits := _from_base64(kind, head.get(f"Checksum{kind.upper()}")):
                return f"{kind}:{digits}"
    etag = str(head.get("ETag", "")).strip('"')
    encrypted = head.get("ServerSideEncryption", "AES256") != "AES256"
    own_key = "SSECustomerAlgorithm" in head
    if encrypted or own_key or bucket.endswith(DIRECTORY_BUCKET) or not _HEX.fullmatch(etag):
        return ""
    return f"md5:{etag}"


def gs_digest(item: Mapping[str, Any]) -> str:
    """Return ``md5:digits`` of an object's resource, ``crc32c:digits`` of one made of parts; or nothing."""
    for kind, told in (("md5", item.get("md5Hash")), ("crc32c", item.get("crc32c"))):
        if digits := _from_base64(kind, told):
            return f"{kind}:{digits}"
    return ""


def _from_base64(kind: str, text: Any) -> str:
    """Return the hex digits of a digest in base64; nothing for anything else."""
    if not isinstance(text, str):
        return ""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return data.hex() if len(data) == _DIGEST_BYTES[kind] else ""
