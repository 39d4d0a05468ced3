"""A program: downloads, updates and deletions, each artifact held by ``sync_ledger.py`` when it is committed.

``python durable.py HOME ENDPOINT ROUNDS SEED`` prints one JSON object of totals; it raises when something
that is told to be there could be lost with the power. It needs no root and no power cut.
"""

import asyncio
import json
import random
import sys
from pathlib import Path

from modelhostd.core.errors import ModelhostError
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import OperationState, Source
from modelhostd.host import Host
from tests.event_validators import ViolationError
from tests.kill.plan import REPOS, REVISIONS, Plan, make_host
from tests.kill.sync_ledger import SyncLedger

MODELS = 3
END_S = 30.0


async def _work(host: Host, rounds: int, chance: random.Random) -> int:
    """Change models and download them; returns how many downloads succeeded."""
    succeeded = 0
    for number in range(rounds):
        model = f"m{number % MODELS}"
        await _point_to_another(host, model, chance)
        begun = await host.transfers.download(model, refresh=True)
        done = await host.operations.wait(begun.id, END_S)
        succeeded += done.state is OperationState.SUCCEEDED
        if chance.random() < 0.2:
            gone = await host.models.delete(model, force=True, keep_entry=chance.random() < 0.5)
            await host.operations.wait(gone.id, END_S)
    return succeeded


async def _point_to_another(host: Host, model: str, chance: random.Random) -> None:
    uri = f"hf://org/r{chance.randrange(REPOS)}"
    spec = ModelSpec(Source(uri, revision=chance.choice(REVISIONS)))
    if model in host.registry.committed.models:
        await host.models.update(model, lambda _: spec)
    else:
        await host.models.create(spec, model)


async def _run(home: Path, endpoint: str, rounds: int, seed: int) -> dict[str, int]:
    ledger = SyncLedger(home)
    with ledger.kept():
        host, files = make_host(Plan(1, str(seed), home, endpoint))
        await files.recover()
        await host.start()
        succeeded = await _work(host, rounds, random.Random(seed))
        await host.stop(grace_s=1.0)
        await host.close()
    ledger.expect_nothing_lost()
    return {"seed": seed, "succeeded": succeeded, "checked": ledger.checked}


def main(home: Path, endpoint: str, rounds: int, seed: int) -> None:
    """Do the work and print what was seen."""
    home.mkdir(mode=0o700, parents=True)
    try:
        totals = asyncio.run(_run(home, endpoint, rounds, seed))
    except (ModelhostError, ViolationError) as error:
        error.add_note(f"seed {seed}")
        raise
    print(json.dumps(totals))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
