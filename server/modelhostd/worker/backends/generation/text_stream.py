"""From tokens to text, piece by piece: whole characters only, up to a stop text."""

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 6
"""Tokens before a piece that decide how it is written: leading blanks, joined characters."""
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one generation. ``stopped`` = a stop text was met; what follows it is dropped."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str], *, skip_special: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._skip_special = skip_special
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._begin = 0
        self._read = len(self._tokens)
        self._held = ""
        self.stopped = False

    def keep(self, token: int) -> None:
        """Take a token whose text nobody asks for before the end; :meth:`end` has it."""
        self._tokens.append(token)

    def push(self, token: int) -> str:
        """Return the text that is certain now: without half characters, and without the begin of a stop."""
        self.keep(token)
        return self._release(self._decoded(final=False), final=False)

    def end(self) -> str:
        """Return what was held back."""
        return "" if self.stopped else self._release(self._decoded(final=True), final=True)

    def _decoded(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._read])
        now = self._decode(self._tokens[self._begin :])
        if len(now) <= len(before) or (now.endswith(_INCOMPLETE) and not final):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, more: str, *, final: bool) -> str:
        self._held += more
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` may be the begin of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
