"""``s3://`` sources: what there is by s3fs, over our connections; the bytes by signed URLs, by our pump.

Without an access key nothing is signed: that is what public buckets want. No other place is looked at
for keys (profiles, the metadata service of a cloud's machine): what is used is what the operator gave.
"""

import asyncio
import importlib
import os
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypeVar

from modelhostd.adapters.connections import Connections, Credential, Response
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.objects import (
    Elsewhere,
    Listed,
    ObjectStore,
    Wires,
    answered,
    library,
    place_of,
    with_digest,
)
from modelhostd.adapters.wire import bad_reply
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.object_facts import s3_digest
from modelhostd.core.resources import Source
from modelhostd.ports import RemoteFile

PUBLIC_ENDPOINT = "https://s3.amazonaws.com"
REGION = "us-east-1"
SIGNED_S = 3600
"""How long a URL is good for; one that has run out is signed again."""

_NOT_LOOKED_AT = {
    "profile": (None, None, None, None),
    "config_file": (None, None, os.devnull, None),
    "credentials_file": (None, None, os.devnull, None),
}
"""Where botocore would look for keys, regions and endpoints, for which the operator has other places."""

_CODE = re.compile(rb"<Code>([A-Za-z]{1,64})</Code>")
_BAD_KEYS = frozenset(
    {b"InvalidAccessKeyId", b"SignatureDoesNotMatch", b"ExpiredToken", b"RequestTimeTooSkewed"}
)
_REGION = re.compile(r"[a-z0-9-]{1,32}")

T = TypeVar("T")


class S3(ObjectStore):
    """Buckets of one store that speaks S3's protocol; satisfies ``source.SourceAdapter``."""

    def __init__(
        self,
        config: HttpSourceConfig,
        endpoint: str = PUBLIC_ENDPOINT,
        region: str = REGION,
        lent: tuple[str, str] = ("", ""),
    ) -> None:
        """``lent``: an access key that is good for a time, and the session token that goes with it."""
        super().__init__(config, endpoint)
        self._region = region
        self._lent = lent
        self._lock = threading.Lock()
        self._regions: dict[str, str] = {}
        """By bucket: where it was found to be."""
        self._signer: tuple[object, Any] = (None, None)
        self._session: Any = None
        """Of aiobotocore, which keeps what it reads of S3's model: a tenth of a second for each client."""

    def listed(self, connections: Connections, source: Source) -> Sequence[Listed]:
        """List with ListObjectsV2; an object of this name is looked at where nothing is below."""
        name = place_of(source)

        async def ask(files: Any) -> Mapping[str, Any]:
            found: Mapping[str, Any] = await files._find(name, detail=True)  # noqa: SLF001
            return found

        async def ask_for_one(files: Any) -> Mapping[str, Any]:
            return {name: await files._info(name)}  # noqa: SLF001

        try:
            found = self._ask(connections, source, ask)
        except ModelhostError as error:
            # Who may read an object need not be allowed to list others.
            if error.reason is not Reason.ACCESS_DENIED:
                raise
            found = self._ask(connections, source, ask_for_one)
        return [Listed(one, _size(facts), facts) for one, facts in found.items()]

    def described(
        self, connections: Connections, source: Source, wanted: Mapping[str, Listed]
    ) -> Sequence[RemoteFile]:
        """Ask for the head of each object, several at a time: only there are its checksums."""
        bucket = place_of(source).partition("/")[0]

        async def ask(files: Any) -> Sequence[RemoteFile]:
            turns = asyncio.Semaphore(self.files_at_once)

            async def one(path: str, listed: Listed) -> RemoteFile:
                key = listed.name.partition("/")[2]
                async with turns:
                    head = await files._call_s3(  # noqa: SLF001
                        "head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED"
                    )
                etag = str(head.get("ETag", ""))[:200]
                if head.get("ContentLength") != listed.size_bytes or etag != listed.facts["ETag"]:
                    raise bad_reply(source.uri, f"{listed.name!a} changed since it was listed")
                file = RemoteFile(path, listed.size_bytes, validator=etag)
                return with_digest(file, s3_digest(head, bucket))

            return await asyncio.gather(*(one(*item) for item in wanted.items()))

        return self._ask(connections, source, ask)

    def locate(self, source: Source, name: str, file: RemoteFile) -> str:
        """Return a URL signed for an hour; a plain one where there is no access key."""
        bucket = name.partition("/")[0]
        with self._lock:
            key, region = self._key(source), self._region_of(bucket)
            wanted = (key and (key.user, key.token), region, "." in bucket)
            if self._signer[0] != wanted:
                self._signer = (wanted, self._file_system(source, region, _refuse_to_send))
            signed = self._signer[1]._url(name, expires=SIGNED_S)  # noqa: SLF001
            return str(answered(source, signed))

    def judged(self, response: Response, body: bytes) -> int:
        """Return the status; 401 for a refused key, and raise for a bucket of another region."""
        there = response.headers.get("x-amz-bucket-region", "")
        if response.status in {301, 307, 400} and _REGION.fullmatch(there):
            raise Elsewhere(there)
        code = _CODE.search(body[:4096])
        bad_key = response.status in {400, 403} and code is not None and code[1] in _BAD_KEYS
        return 401 if bad_key else response.status

    def shown(self, source: Source) -> Credential | None:
        """Return None: URLs are signed."""
        return None

    def signs(self, source: Source) -> bool:
        """Whether there is a key to sign with."""
        return self.credential(self.endpoint, source) is not None

    def _ask(
        self, connections: Connections, source: Source, ask: Callable[[Any], Awaitable[T]]
    ) -> T:
        """Return the answer to a question, asked where the bucket is."""
        bucket = place_of(source).partition("/")[0]
        library("s3fs", source)
        wires = Wires(self, connections, source, None, self._key(source))

        async def asked(region: str) -> T:
            with self._lock:
                # Nothing is waited for in this: the keys are given, and the region.
                files = self._file_system(source, region, wires.send)
                client = await files.set_session()
            try:
                return await ask(files)
            finally:
                await client.close()

        region = self._region_of(bucket)
        for _ in range(2):
            try:
                return answered(source, asked(region))
            except Elsewhere as other:
                region = str(other.args[0])
                with self._lock:
                    while len(self._regions) >= 1000:
                        self._regions.pop(next(iter(self._regions)))
                    self._regions[bucket] = region
        raise bad_reply(source.uri, f"the bucket is said to be in region {region!a}, and is not")

    def _region_of(self, bucket: str) -> str:
        return self._regions.get(bucket, self._region)

    def _key(self, source: Source) -> Credential | None:
        """Return the access key and its secret; None for strangers."""
        credential = self.credential(self.endpoint, source)
        if credential is not None and not credential.user:
            raise ModelhostError(
                Reason.AUTHENTICATION_REQUIRED,
                f"{source.uri}: {self.home} needs an access key and its secret, and there is one word "
                f"for it; write `{self.home} ACCESS_KEY SECRET_KEY` in downloads.credentials",
                {"source": source.uri, "credential": "an access key without its secret"},
            )
        return credential

    def _file_system(self, source: Source, region: str, send: Callable[..., Any]) -> Any:
        """Return an s3fs that sends with ``send``, once each request. Under the lock."""
        key = self._key(source)
        own = self.endpoint != PUBLIC_ENDPOINT
        # Amazon's certificates are for one label before the region's host; others have one host for all.
        by_path = own or "." in place_of(source).partition("/")[0]
        style = "path" if by_path else "virtual"
        s3fs = library("s3fs", source)
        if self._session is None:
            session = importlib.import_module("aiobotocore.session").AioSession
            self._session = session(session_vars=_NOT_LOOKED_AT)
        return s3fs.S3FileSystem(
            asynchronous=True,
            skip_instance_cache=True,
            session=self._session,
            anon=key is None,
            key=key.user if key else None,
            secret=key.token if key else None,
            token=self._lent[1] or None if key and key.user == self._lent[0] else None,
            endpoint_url=self.endpoint if own else None,
            client_kwargs={"region_name": region},
            config_kwargs={
                "http_session_cls": partial(_Session, send),
                "retries": {"total_max_attempts": 1},
                "ignore_configured_endpoint_urls": True,
                # By the region's own host: another one redirects, and no signature survives that.
                "s3": {"addressing_style": style, "us_east_1_regional_endpoint": "regional"},
                **({"signature_version": "s3v4"} if key else {}),
            },
        )


class _Session:
    """What aiobotocore takes for its HTTP session."""

    def __init__(self, send: Callable[..., Any], **_: Any) -> None:
        self._send = send
        self._sessions: dict[str, Any] = {}
        """None of aiohttp's: s3fs looks whether they are closed."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def close(self) -> None:
        """Nothing is held."""

    async def send(self, request: Any) -> Any:
        """Send one prepared request of botocore's and return its answer whole."""
        headers = {name: _text(value) for name, value in request.headers.items()}
        response, body = await self._send(request.method, request.url, headers)
        found = {name.lower(): value for name, value in response.headers.items()}
        made = importlib.import_module("aiobotocore.awsrequest").AioAWSResponse
        return made(request.url, response.status, found, _Read(body))


class _Read:
    """A body that was read."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def read(self) -> bytes:
        """Return all of it."""
        return self._body


async def _refuse_to_send(*_: object) -> Any:
    raise AssertionError("signing asks nobody")


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _size(facts: Mapping[str, Any]) -> int:
    size = facts.get("size")
    return size if isinstance(size, int) else -1
