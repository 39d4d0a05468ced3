"""What is taken of a client's stream that is refused."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from modelhostd.api import messages


class Sender:
    """A client's stream: ``count`` messages of ``size`` bytes, and then its end, or silence."""

    def __init__(self, count: int, size: int = 1, *, ends: bool = True) -> None:
        self.left = count
        self._size = size
        self._ends = ends

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self.left:
            self.left -= 1
            return bytes(self._size)
        if not self._ends:
            await asyncio.Event().wait()
        raise StopAsyncIteration


async def test_what_a_refused_client_still_sends_is_taken() -> None:
    """The stream is read to its end, so that no write of the client's meets a stream that has ended."""
    sender = Sender(100)
    await messages.read_on(sender)
    assert sender.left == 0


async def test_a_silent_client_is_not_waited_for() -> None:
    """Who keeps its stream open and sends nothing gets its refusal soon."""
    sender = Sender(3, ends=False)
    await messages.read_on(sender)
    assert sender.left == 0


async def test_an_endless_client_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on and on is refused after so many bytes."""
    monkeypatch.setattr(messages, "LINGER_BYTES", 10_000)
    sender = Sender(100, 1_000)
    await messages.read_on(sender)
    assert sender.left == 90
