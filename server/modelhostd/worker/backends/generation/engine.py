"""Gets many texts on, one token each at a time, and takes new ones in between two tokens."""

import itertools
import time
from bisect import insort
from collections.abc import Callable, Sequence

import torch

from modelhostd.worker.backend import Cancelled
from modelhostd.worker.backends.generation.generated import Generation
from modelhostd.worker.backends.generation.lanes import Lane, Row

REST_S = 2.0
"""How long a text keeps its place while its reader takes nothing and others wait: a short stall of a network
costs nobody a second run of the prompt."""


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
            with torch.inference_mode():
                self._drop_unwanted()
                self._rest_and_wake()
                busy = bool(self._running)
                if busy:
                    self._decode()
                # Of prompts one pass between two tokens: those who read are held up by no crowd, nor by a long one.
                while first := self._next():
                    self._start(first)
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

    def _next(self) -> list[Generation]:
        """Take who begins now, or goes on beginning: the first that waits, and those behind it that can share its pass."""
        if self._beginning is not None:
            return [self._beginning]
        if not self._has_room():
            return []
        first = self._pending.pop(0)
        while not self._fits(first):
            self._idle()[0].row = None
        chosen, lengths = [first], [len(first.tokens_so_far)]
        while self._pending and self._fits(self._pending[0], beside=chosen):
            lengths.append(len(self._pending[0].tokens_so_far))
            if not self._lane.fit_together(lengths):
                break
            chosen.append(self._pending.pop(0))
        return chosen

    def _fits(
        self,
        generation: Generation,
        *,
        without: Sequence[Generation] = (),
        beside: Sequence[Generation] = (),
    ) -> bool:
        """Whether there is a place for one more, however long it and the others become."""
        resting = [g for g in self._resting if g.row is not None and g not in without]
        placed = [*self._running, *resting, *beside]
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

    def _start(self, chosen: list[Generation]) -> None:
        """Run several prompts, or the next part of one; after its end a text has its place in the lane."""
        if len(chosen) == 1:
            self._begin(chosen[0])
            return
        begun: list[tuple[Row, torch.Tensor]] = []
        try:
            begun = self._lane.prefill_together([g.tokens_so_far for g in chosen])
        except Exception as error:
            if self._is_fatal(error):
                self._fail(chosen, error)
        if not begun:
            # Whose fault it is each shows alone; not before what they computed together has gone with their error.
            for generation in chosen:
                self._begin(generation)
            return
        for generation, (row, scores) in zip(chosen, begun, strict=True):
            self._place(generation, row, scores)

    def _begin(self, generation: Generation) -> None:
        self._beginning = None
        try:
            row, scores = self._lane.prefill(generation.tokens_so_far, generation.row)
        except Exception as error:
            self._fail([generation], error)
            return
        if scores is None:
            generation.row, self._beginning = row, generation
            return
        self._place(generation, row, scores)

    def _place(self, generation: Generation, row: Row, scores: torch.Tensor) -> None:
        """Take the first token of a prompt that was run, and have the text go on with the others."""
        generation.row = row
        try:
            if self._take(generation, generation.sampler.pick(scores)):
                self._join(generation)
        except Exception as error:
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
        self._put_in_order()

    def _leave(self, generation: Generation, *, keep: bool = False) -> None:
        assert generation.row is not None
        self._lane.leave(generation.row, keep=keep)
        self._running.remove(generation)
        self._put_in_order()

    def _put_in_order(self) -> None:
        places = {id(row): place for place, row in enumerate(self._lane.rows)}
        self._running.sort(key=lambda g: places[id(g.row)])

    def _fail(self, generations: list[Generation], error: Exception) -> None:
        for generation in generations:
            if not generation.done:
                generation.answer.fail(error)
        if self._is_fatal(error):
            raise error
