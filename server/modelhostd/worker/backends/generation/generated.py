"""One text that is generated: its tokens so far, and what its reader gets of them."""

import numpy as np

from modelhostd.worker.backend import Answer, Array
from modelhostd.worker.backends.generation.lanes import Row
from modelhostd.worker.backends.generation.parameters import Parameters
from modelhostd.worker.backends.generation.sampling import Sampler
from modelhostd.worker.backends.generation.text_stream import TextStream


class Generation:
    """One text: its prompt, what was generated so far, and who waits for it."""

    def __init__(
        self,
        answer: Answer,
        prompt: list[int],
        parameters: Parameters,
        sampler: Sampler,
        text: TextStream,
        *,
        stream: bool,
        before: str = "",
    ) -> None:
        """``stream`` = each piece is sent as it comes; ``before`` is put in front of the whole text."""
        self.answer = answer
        self.prompt = prompt
        self.parameters = parameters
        self.sampler = sampler
        self.tokens: list[int] = []
        self.done = False
        """Whether its last piece was sent."""
        self.row: Row | None = None
        """What the model remembers of it: it has a place. None = it waits for one, or has lost it."""
        self.number = 0
        """Its place in the order of those that wait."""
        self.rests_since = 0.0
        self._text = text
        self._stream = stream
        self._in_pieces = stream or bool(parameters.stop)
        """Whether each token's text matters as it comes. Else all are decoded at the end: one by one takes 1.5 % of a small model's time."""
        self._pieces = [before] if before else []

    @property
    def resting(self) -> bool:
        """Whether its reader takes no more pieces for now."""
        return self._stream and not self.answer.ready

    @property
    def tokens_so_far(self) -> list[int]:
        """The prompt and what was generated."""
        return self.prompt + self.tokens

    def push(self, token: int, end_tokens: frozenset[int], max_tokens: int) -> bool:
        """Take the next token, send what is to be sent; whether the text goes on."""
        self.tokens.append(token)
        ended = token in end_tokens and not self.parameters.ignore_eos
        if not ended and self._in_pieces:
            self._pieces.append(self._text.push(token))
        elif not ended:
            self._text.keep(token)
        if ended or self._text.stopped:
            self._finish("stop")
            return False
        if len(self.tokens) >= max_tokens:
            self._finish("length")
            return False
        if self._stream and any(self._pieces):
            self._send("", last=False)
        return True

    def _finish(self, reason: str) -> None:
        self.done = True
        self._pieces.append(self._text.end())
        self._send(reason, last=True)

    def _send(self, reason: str, *, last: bool) -> None:
        text = "".join(self._pieces)
        self._pieces = []
        self.answer.send(
            {
                "text_output": _bytes(text),
                "finish_reason": _bytes(reason),
                "num_input_tokens": np.array([len(self.prompt)], np.uint32),
                "num_output_tokens": np.array([len(self.tokens)], np.uint32),
            },
            last=last,
        )


def _bytes(text: str) -> Array:
    made = np.empty(1, object)
    made[0] = text.encode("utf-8", "replace")
    return made
