# Made from modelhost/_async/generation.py by generate_sync.py: do not edit, change that.
"""A text that comes in pieces."""

from dataclasses import replace
from types import TracebackType
from typing import Self

from modelhost._generation import Generation, read_piece
from modelhost._sync.transport import Stream
from modelhost.v1 import inference_service_pb2


class TextStream:
    """A text that is being made: iterate over its pieces, each a ``str``; ``close`` ends the work.

    ``result`` has the text so far, its token counts, and at the end why it ended. What it fails with is
    raised where the next piece is asked for; what came before stands in ``result``.
    """

    def __init__(self, stream: Stream[inference_service_pb2.GenerateResponse]) -> None:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while not self._ended:
            piece = self._next()
            if piece is None:
                self._ended = True
                break
            self._last = read_piece(piece)
            if piece.text:
                self._pieces.append(piece.text)
                return piece.text
        raise StopIteration

    def close(self) -> None:
        """End the work, if it is not at its end; the model goes on with other texts at once."""
        self._ended = True
        self._stream.cancel()

    def read_all(self) -> Generation:
        """Return the whole text."""
        for _ in self:
            pass
        return self.result

    def _next(self) -> inference_service_pb2.GenerateResponse | None:
        read = False
        try:
            piece = self._stream.read()
            read = True
            return piece
        finally:
            if not read:  # It failed, or whoever waits was interrupted: nobody will read the rest.
                self._ended = True
                self._stream.cancel()
