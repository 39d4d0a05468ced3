"""What GetHost says of a source is what became of the last question to it."""

from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.contacts import Contacts
from modelhostd.adapters.downloads import HubDownloads
from modelhostd.adapters.hub import HubConfig
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Source
from modelhostd.core.transfer import RetryPolicy


async def test_contact_follows_the_last_question(tmp_path: Path) -> None:
    """UNKNOWN before the first question, REACHABLE after an answer (a refusal too), else UNREACHABLE."""
    store = BlobStore(StoreConfig(tmp_path / "home"))
    files = {"config.json": b"{}", "model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}"}
    with LoopbackHub({"org/a": Repo(files)}) as hub:
        config = HubConfig(endpoint=hub.endpoint, retry=RetryPolicy(tries=1))
        downloads = HubDownloads(config, store, TreeStore(store))
        assert downloads.contact.state == "UNKNOWN"
        await downloads.inspect(Source("hf://org/a"))
        assert downloads.contact.state == "REACHABLE"
        with pytest.raises(ModelhostError):
            await downloads.inspect(Source("hf://org/nobody"))
        assert downloads.contact.state == "REACHABLE"
    with pytest.raises(ModelhostError):
        await downloads.inspect(Source("hf://org/a"))
    assert downloads.contact.state == "UNREACHABLE"
    assert downloads.contact.message
    store.close()


@pytest.mark.parametrize(
    "reason", [Reason.SOURCE_NOT_ALLOWED, Reason.UNIMPLEMENTED, Reason.INVALID_ARGUMENT]
)
async def test_a_question_that_was_never_put_says_nothing(reason: Reason) -> None:
    """What we refuse ourselves is no answer of the source's: what was known of it stays."""
    contacts = Contacts(lambda: 1.0)

    async def refused() -> None:
        raise ModelhostError(reason, "no")

    with pytest.raises(ModelhostError):
        await contacts.asking("s3", refused())
    assert contacts.get("s3").state == "UNKNOWN"
    contacts.reached("s3")
    with pytest.raises(ModelhostError):
        await contacts.asking("s3", refused())
    assert contacts.get("s3").state == "REACHABLE"
