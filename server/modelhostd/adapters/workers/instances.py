"""What one worker is asked to do with its instances, and the end of what nobody waits for any more.

Rule: who asks is told when it has ended, also where he was cancelled, and however often: another command for the same
instance may then follow.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.adapters.workers.control import Control
from modelhostd.adapters.workers.ends import to_its_end
from modelhostd.adapters.workers.images import Leavings
from modelhostd.core.resources import Health, Progress
from modelhostd.ports import Loaded, LoadSpec
from modelhostd.worker.wire.images import Kept


class Instances:
    """The instances of one worker. ``hung`` ends it where a load cannot be cancelled, and returns when it is reaped."""

    def __init__(
        self,
        config: WorkersConfig,
        device: str,
        control: Control,
        leavings: Leavings,
        hung: Callable[[str], Awaitable[None]],
    ) -> None:
        self._config = config
        self._device = device
        self._control = control
        self._leavings = leavings
        self._hung = hung

    async def load(self, spec: LoadSpec, report: Callable[[Progress], None]) -> Loaded:
        """Load an instance; see :meth:`modelhostd.ports.Workers.load`."""
        key = spec.instance, spec.generation
        self._leavings.begin(key)
        number, answer = self._control.load(spec, report)
        try:
            loaded = await asyncio.shield(answer)
        except asyncio.CancelledError:
            self._leavings.forget(key)
            await self._stop(number, answer, lambda: self.unload(*key))
            raise
        except BaseException:
            self._leavings.forget(key)
            raise
        self._leavings.loaded(key, loaded.measured_bytes)
        return loaded

    async def adopt(
        self, spec: LoadSpec, image: Kept, report: Callable[[Progress], None]
    ) -> tuple[Loaded, bool]:
        """Load an instance from the image that an earlier worker left; False: nobody waits for it any more.

        Cancelled, it stops as soon as it can, and raises unless it was done by then: off the device again, where it has a
        copy, or else where it is, until it is wanted. Raises what the worker answers, too; the image is then as it was.
        """
        key = spec.instance, spec.generation

        def note(loaded: Loaded) -> None:
            if loaded.adopted_bytes:
                self._leavings.adopted(key, loaded.measured_bytes, image)
            else:
                # Its module uses little of that, so it was freed; what is there now is told of as after any load.
                self._leavings.loaded(key, loaded.measured_bytes)

        async def leave() -> None:
            note(answer.result())
            if answer.result().host_bytes:
                await self.demote(*key)

        self._leavings.begin(key)
        number, answer = self._control.load(spec, report, adopt=True)
        try:
            loaded = await asyncio.shield(answer)
        except asyncio.CancelledError:
            await self._stop(number, answer, leave)
            if answer.done() and answer.exception() is None:
                return answer.result(), False
            self._leavings.forget(key)
            raise
        except BaseException:
            self._leavings.forget(key)
            raise
        note(loaded)
        return loaded, True

    async def demote(self, instance: str, generation: int) -> int:
        """Take an instance off the device; see :meth:`modelhostd.ports.Workers.demote`."""
        kept = await self._control.demote(instance, generation)
        if not kept:
            self._leavings.forget((instance, generation))
        return kept

    async def drop_copy(self, instance: str, generation: int) -> int:
        """Give an instance's copy in host RAM back; see :meth:`modelhostd.ports.Workers.drop_copy`."""
        if self._device == "cpu":
            return 0  # the weights themselves
        # Before it goes, and for good: what is in its place later would be taken for it after a crash.
        self._leavings.forget((instance, generation))
        return await self._control.drop_copy(instance, generation)

    async def promote(self, spec: LoadSpec, report: Callable[[Progress], None]) -> Loaded:
        """Bring an instance back to the device; see :meth:`modelhostd.ports.Workers.promote`."""
        number, answer = self._control.promote(spec, report)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            back = self.demote
            await self._stop(number, answer, lambda: back(spec.instance, spec.generation))
            raise

    async def unload(self, instance: str, generation: int) -> None:
        """Free an instance; returns when the worker did, or is gone itself."""
        self._leavings.forget((instance, generation))
        await self._control.unload(instance, generation)

    async def check(self, instance: str, generation: int) -> tuple[Health, str]:
        """Run a health check; see :meth:`modelhostd.ports.Workers.check`."""
        return await self._control.check(instance, generation, self._config.check_timeout_s)

    async def _stop(
        self,
        number: int,
        answer: "asyncio.Future[Loaded]",
        undo: Callable[[], Awaitable[object]],
    ) -> None:
        """Cancel a command, and wait for its end."""
        self._control.cancel(number, command=True)
        with contextlib.suppress(asyncio.CancelledError):  # Its caller raises the first of them.
            await to_its_end(self._take_back(answer, undo))

    async def _take_back(
        self, answer: "asyncio.Future[Loaded]", undo: Callable[[], Awaitable[object]]
    ) -> None:
        # The load may have been done before its cancellation came; then it has to be undone.
        done, _ = await asyncio.wait((answer,), timeout=self._config.load_cancel_timeout_s)
        if not done:
            await self._hung("hung: a cancelled load did not end")
        elif answer.exception() is None:
            await undo()
