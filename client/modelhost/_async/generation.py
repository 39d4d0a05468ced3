"""A text that comes in pieces."""

from dataclasses import replace
from types import TracebackType
from typing import Self

from modelhost._async.transport import AsyncStream
from modelhost._generation import Generation, read_piece
from modelhost.v1 import inference_service_pb2


class AsyncTextStream:
    """A text that is being made: iterate over its pieces, each a ``str``; ``close`` ends the work.

    ``result`` has the text so far, its token counts, and at the end why it ended. What it fails with is
    raised where the next piece is asked for; what came before stands in ``result``.
    """

    def __init__(self, stream: AsyncStream[inference_service_pb2.GenerateResponse]) -> None:
        self._stream = stream
        self._pieces: list[str] = []
        self._last = Generation("", "", 0, 0)
        self._ended = False

    @property
    def result(self) -> Generation:
        """What has come so far."""
        # Joined here: to join with each piece would take the square of the text's length.
        text = "".join(self._pieces)
        self._pieces = [text]
        return replace(self._last, text=text)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._ended:
            piece = await self._next()
            if piece is None:
                self._ended = True
                break
            self._last = read_piece(piece)
            if piece.text:
                self._pieces.append(piece.text)
                return piece.text
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the work, if it is not at its end; the model goes on with other texts at once."""
        self._ended = True
        self._stream.cancel()

    async def read_all(self) -> Generation:
        """Return the whole text."""
        async for _ in self:
            pass
        return self.result

    async def _next(self) -> inference_service_pb2.GenerateResponse | None:
        read = False
        try:
            piece = await self._stream.read()
            read = True
            return piece
        finally:
            if not read:  # It failed, or whoever waits was interrupted: nobody will read the rest.
                self._ended = True
                self._stream.cancel()
