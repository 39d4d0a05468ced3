"""Gets many texts on, one token each at a time, and takes new ones in between two tokens."""

import itertools
import time
from bisect import insort
from collections.abc import Callable, Sequence

import numpy as np
import torch

from modelhostd.worker.backend import Answer, Array, Cancelled
from modelhostd.worker.backends.generation.lanes import Lane, Row
from modelhostd.worker.backends.generation.parameters import Parameters
from modelhostd.worker.backends.generation.sampling import Sampler
from modelhostd.worker.backends.generation.text_stream import TextStream

REST_S = 2.0
"""How long a text keeps its place while its reader takes nothing and others wait: a short stall of a network
costs nobody a second run of the prompt."""


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
        self._pieces = [before] if before else []

    @property
    def resting(self) -> bool:
        """Whether its reader takes no more pieces for now."""
        return self._stream and not self.answer.ready

    def push(self, token: int, end_tokens: frozenset[int], max_tokens: int) -> bool:
        """Take the next token, send what is to be sent; whether the text goes on."""
        self.tokens.append(token)
        ended = token in end_tokens and not self.parameters.ignore_eos
        if not ended:
            self._pieces.append(self._text.push(token))
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


class Engine:
    """The texts of one model. Its methods are called by one thread at a time.

    A text waits in ``pending`` until there is a place, is in the lane, or rests because its reader does. Where others wait, one
    that rests loses its place: once it is read, it waits for another and is run through the model again.
    """

    def __init__(
        self,
        lane: Lane,
        *,
        max_sequences: int,
        context_tokens: int,
        cache_tokens: int,
        end_tokens: frozenset[int],
        is_fatal: Callable[[BaseException], bool],
    ) -> None:
        """``cache_tokens``: how many all texts in places may come to, padded to the longest; ``is_fatal`` tells after which errors nothing in this process can be trusted."""
        self._lane = lane
        self._max_sequences = max_sequences
        self._context_tokens = context_tokens
        self._cache_tokens = cache_tokens
        self._end_tokens = end_tokens
        self._is_fatal = is_fatal
        self._pending: list[Generation] = []
        """In the order of their turns."""
        self._arrivals = itertools.count()
        self._beginning: Generation | None = None
        """Whose prompt is on its way through the model."""
        self._running: list[Generation] = []
        """In the order of the lane's rows."""
        self._resting: list[Generation] = []

    def add(self, generation: Generation) -> None:
        """Take a text. Of those that wait the higher priority begins first, then the earlier one."""
        generation.number = next(self._arrivals)
        insort(self._pending, generation, key=lambda g: (-g.answer.priority, g.number))

    def step(self) -> bool:
        """Generate one token of each text that can go on; whether there is one that still can."""
        try:
            self._drop_unwanted()
            self._rest_and_wake()
            with torch.inference_mode():
                busy = bool(self._running)
                if busy:
                    self._decode()
                # Of one prompt a part between two tokens: those who read are held up by no crowd, nor by a long one.
                while self._beginning is not None or self._has_room():
                    if self._beginning is None and not self._fits(self._pending[0]):
                        self._idle()[0].row = None
                        continue
                    self._beginning = self._beginning or self._pending.pop(0)
                    self._start(self._beginning)
                    if busy or self._beginning is not None:
                        break
        except Exception as error:
            # Of a pass, or of one that leaves it: whoever shares it is concerned.
            running, self._running = self._running, []
            self._lane.clear()
            self._fail(running, error)
        if self._running or self._beginning is not None:
            return True
        return self._has_room() or any(not g.resting for g in self._resting)

    def _fits(self, generation: Generation, without: Sequence[Generation] = ()) -> bool:
        """Whether there is a place for one more, however long it and the others become."""
        resting = [g for g in self._resting if g.row is not None and g not in without]
        placed = [*self._running, *resting]
        if len(placed) >= self._max_sequences:
            return False
        longest = max(self._longest(g) for g in (*placed, generation))
        return not placed or (len(placed) + 1) * longest <= self._cache_tokens

    def _longest(self, generation: Generation) -> int:
        """Return how many tokens a text can come to."""
        wanted = len(generation.prompt) + generation.parameters.max_tokens
        return min(wanted, self._context_tokens)

    def _has_room(self) -> bool:
        """Whether one that waits can begin, in the place of those that rest where need be: none loses its own in vain."""
        if not self._pending:
            return False
        first, idle = self._pending[0], self._idle()
        return self._fits(first) or (bool(idle) and self._fits(first, without=idle))

    def _idle(self) -> list[Generation]:
        """Return who has rested in a place for long enough to lose it, the longest first."""
        since = time.monotonic() - REST_S
        return [g for g in self._resting if g.row is not None and g.rests_since <= since]

    def _drop_unwanted(self) -> None:
        for generation in [g for g in self._running if g.answer.unwanted]:
            self._leave(generation)
            generation.answer.fail(Cancelled())
        if self._beginning is not None and self._beginning.answer.unwanted:
            self._beginning.answer.fail(Cancelled())
            self._beginning = None
        for waiting in (self._pending, self._resting):
            for generation in [g for g in waiting if g.answer.unwanted]:
                waiting.remove(generation)
                generation.answer.fail(Cancelled())

    def _rest_and_wake(self) -> None:
        for generation in [g for g in self._running if g.resting]:
            self._leave(generation, keep=True)
            generation.rests_since = time.monotonic()
            self._resting.append(generation)
        for generation in [g for g in self._resting if not g.resting]:
            self._resting.remove(generation)
            if generation.row is None:
                # Behind those that wait: who reads slowly must not keep the others out.
                self.add(generation)
                continue
            try:
                self._join(generation)
            except Exception as error:
                self._fail([generation], error)

    def _start(self, generation: Generation) -> None:
        """Run the next part of a prompt; after its last one the text has its place in the lane."""
        try:
            tokens = generation.prompt + generation.tokens
            generation.row, scores = self._lane.prefill(tokens, generation.row)
            if scores is None:
                return
            self._beginning = None
            if self._take(generation, generation.sampler.pick(scores)):
                self._join(generation)
        except Exception as error:
            self._beginning = None
            self._fail([generation], error)

    def _decode(self) -> None:
        scores = self._lane.step()
        likeliest = scores.argmax(-1).tolist()
        for index, generation in enumerate(list(self._running)):
            try:
                token = likeliest[index]
                if not generation.sampler.plain:
                    token = generation.sampler.pick(scores[index])
                goes_on = self._take(generation, token)
            except Exception as error:
                self._leave(generation)
                self._fail([generation], error)
                continue
            if not goes_on:
                self._leave(generation)

    def _take(self, generation: Generation, token: int) -> bool:
        assert generation.row is not None
        generation.row.token = token
        room = self._context_tokens - len(generation.prompt)
        return generation.push(token, self._end_tokens, min(generation.parameters.max_tokens, room))

    def _join(self, generation: Generation) -> None:
        assert generation.row is not None
        self._lane.join(generation.row)
        self._running.append(generation)
        places = {id(row): place for place, row in enumerate(self._lane.rows)}
        self._running.sort(key=lambda g: places[id(g.row)])

    def _leave(self, generation: Generation, *, keep: bool = False) -> None:
        assert generation.row is not None
        self._lane.leave(generation.row, keep=keep)
        self._running.remove(generation)

    def _fail(self, generations: list[Generation], error: Exception) -> None:
        for generation in generations:
            if not generation.done:
                generation.answer.fail(error)
        if self._is_fatal(error):
            raise error


def _bytes(text: str) -> Array:
    made = np.empty(1, object)
    made[0] = text.encode("utf-8", "replace")
    return made
