"""A home that asks an object store on loopback, and what is stored there."""

from pathlib import Path

from modelhostd.adapters.credentials import Credentials, Maker
from modelhostd.adapters.gs import GoogleStorage
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.s3 import S3
from modelhostd.adapters.source import TransferConfig
from modelhostd.core.origins import parse_target
from tests.adapters.downloads_support import PATIENT, tiny
from tests.adapters.loopback_objects import LoopbackObjects
from tests.adapters.source_desk import SourceDesk

SECRET = "s3_canary_5ec7e7"
TOKEN = "gs_canary_70ce4"
KEY = "AKIACANARY"
FILES = tiny()


def put(store: LoopbackObjects, prefix: str = "models/tiny") -> None:
    """Store a small model below a prefix."""
    for path, data in FILES.items():
        store.put(f"{prefix}/{path}", data)


def desk_for(
    tmp_path: Path,
    store: LoopbackObjects,
    scheme: str,
    *,
    key: str = KEY,
    known: bool = True,
    maker: Maker | None = None,
) -> SourceDesk:
    """Return a home that asks the store, with the credential that it wants or without."""
    origin = parse_target(store.url, "x").origin
    login = ("KEY", SECRET, key) if scheme == "s3" else ("TOKEN", TOKEN)
    makers = {origin: maker} if maker is not None else {}
    credentials = Credentials((), {origin: login} if known and not makers else {}, makers)
    config = HttpSourceConfig(credentials=credentials, transfer=TransferConfig(retry=PATIENT))
    kind: type[S3 | GoogleStorage] = S3 if scheme == "s3" else GoogleStorage
    return SourceDesk(tmp_path / "home", kind(config, store.url))


def close(store: LoopbackObjects) -> None:
    """Let strangers out of both halves."""
    store.secret, store.token = SECRET, TOKEN
