"""The last step of every artifact: one rename that is done whole or taken back."""

import asyncio
from functools import partial

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.threads import in_thread, to_the_end
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.manifest import Manifest


async def publish(trees: TreeStore, manifest: Manifest, canceller: Canceller) -> None:
    """Publish to the end: cancelled before the rename nothing happened, after it is undone."""
    future = in_thread(partial(trees.publish, manifest, canceller.is_cancelled))
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        canceller.cancel()
        await to_the_end(future)
        if future.exception() is None:
            await to_the_end(in_thread(partial(trees.remove, manifest.model, manifest.version)))
        raise
