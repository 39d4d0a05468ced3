"""A process that downloads one model, to be killed: ``python download_child.py HOME ENDPOINT [N [ranged]]``.

Prints ``done`` when the artifact is published. With N it deletes and downloads again, N times; with
``ranged`` by several connections.
"""

import asyncio
import sys
from pathlib import Path

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.downloads import HubDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.hub import HubConfig
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.resources import Source
from modelhostd.ports import DownloadJob
from tests.adapters.downloads_support import RANGED


async def main() -> None:
    """Recover as the daemon does at its start, then download."""
    home, endpoint = Path(sys.argv[1]), sys.argv[2]
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    store = BlobStore(StoreConfig(home, sync_bytes=256 << 10, reserve_bytes=0))
    trees = TreeStore(store)
    files = FileStore(store, trees)
    streams = RANGED if "ranged" in sys.argv[4:] else None
    downloads = HubDownloads(HubConfig(endpoint=endpoint), store, trees, streams=streams)
    await files.recover()
    for round_number in range(rounds):
        if round_number:
            await files.delete_artifact("tiny", 1)
        job = DownloadJob("op", "tiny", 1, Source("hf://org/tiny"), {"round": round_number})
        await downloads.fetch(job, lambda _: None)
    print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
