"""Gates that hold a fake's callers until a test lets them through."""

import asyncio
from collections.abc import Awaitable


class Gate:
    """Holds callers until it is opened, and tells how many stand before it."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._changed = asyncio.Condition()
        self.waiting = 0

    @property
    def closed(self) -> bool:
        """Whether callers are held."""
        return not self._open.is_set()

    def close(self) -> None:
        """Hold whoever comes from now on."""
        self._open.clear()

    def open(self) -> None:
        """Let everybody through, now and from now on."""
        self._open.set()

    async def wait(self) -> None:
        """Wait until the gate is open."""
        self.waiting += 1
        try:
            async with self._changed:
                self._changed.notify_all()
            await self._open.wait()
        finally:
            self.waiting -= 1

    async def reached(self, count: int = 1) -> None:
        """Wait until ``count`` callers stand before the gate."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.waiting >= count)


class ModelGates:
    """The gates of a fake by what passes them and for which model."""

    def __init__(self) -> None:
        self._gates: dict[tuple[str, str], Gate] = {}

    def load_gate(self, model: str) -> Gate:
        """Return the gate that a load of ``model`` passes after its memory is taken."""
        return self._gates.setdefault(("load", model), Gate())

    def unload_gate(self, model: str) -> Gate:
        """Return the gate that an unload of ``model`` passes before its memory is free."""
        return self._gates.setdefault(("unload", model), Gate())

    def demote_gate(self, model: str) -> Gate:
        """Return the gate that a demotion of ``model`` passes before its device memory is free."""
        return self._gates.setdefault(("demote", model), Gate())

    def promote_gate(self, model: str) -> Gate:
        """Return the gate that a promotion of ``model`` passes after its device memory is taken."""
        return self._gates.setdefault(("promote", model), Gate())

    def copy_gate(self, model: str) -> Gate:
        """Return the gate that the end of a copy of ``model`` passes before its host memory is free."""
        return self._gates.setdefault(("copy", model), Gate())

    def piece_gate(self, model: str) -> Gate:
        """Return the gate that each response to a stream of ``model`` passes, except the first."""
        return self._gates.setdefault(("piece", model), Gate())

    def infer_gate(self, model: str) -> Gate:
        """Return the gate that each request to ``model`` passes before it is answered."""
        return self._gates.setdefault(("infer", model), Gate())


async def first(work: Awaitable[None], lost: "asyncio.Future[None]") -> None:
    """Wait for ``work``, or raise what ``lost`` got before it was done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, lost), return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            lost.result()
    finally:
        task.cancel()
