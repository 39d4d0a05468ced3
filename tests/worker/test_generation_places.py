"""Many texts at work on one model: who has a place, who waits for one, and what one's failure costs the others."""

import json
import random

import pytest
import torch

from modelhostd.core.text_memory import read_config
from modelhostd.worker.backend import BadInputError, Cancelled
from modelhostd.worker.backends.generation import engine, lanes
from tests.support import DEADLINE_S
from tests.worker.generation_models import (
    CONFIGS,
    CONTEXT,
    PROMPTS,
    Reader,
    begin,
    expected,
    load,
    run,
    save_model,
)

pytestmark = pytest.mark.timeout(900)
"""The first one imports a library for seconds, which on a swamped machine is more than a minute."""


@pytest.fixture
def backend(llama):
    made = load(llama)
    yield made
    made.unload()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_long_prompt_comes_in_parts_between_the_others_tokens(kind, tmp_path, monkeypatch):
    """Who reads gets a token after each part, who goes meanwhile is noticed, and the text is the library's."""
    model = save_model(tmp_path, kind)
    monkeypatch.setattr(lanes, "PROMPT_TOKENS", 8)
    backend = load(tmp_path, max_sequence_length=CONTEXT)
    prompt = "a long prompt of many parts, four"
    other = begin(backend, "hello", max_tokens=30, ignore_eos=True)
    backend.step()
    readers = [begin(backend, prompt, max_tokens=20) for _ in range(3)]
    for parts in range(1, 5):
        backend.step()
        (running,) = backend._engine._running
        assert len(running.tokens) == 1 + parts
    readers[0].gone = True
    run(backend)
    assert other.ended
    assert isinstance(readers[0].error, Cancelled)
    text, count = expected(model, tmp_path, prompt, 20)
    for reader in readers[1:]:
        assert (reader.text, reader.error) == (text, None)
        assert reader.got[-1]["num_output_tokens"] == count


def test_one_step_is_one_token_of_every_text(backend):
    """Texts get on together, and who comes later is taken in between two tokens."""
    first = begin(backend, "hello", max_tokens=10, ignore_eos=True)
    backend.step()
    second = begin(backend, "x", max_tokens=10, ignore_eos=True)
    for _ in range(9):
        assert not first.ended
        backend.step()
    assert first.ended
    assert not second.ended
    assert run(backend) == 1
    assert second.ended


def test_who_has_gone_is_dropped_between_two_tokens(backend):
    """A reader that leaves frees its place at the next step; the others' texts are the same."""
    alone = begin(backend, "more", max_tokens=30)
    run(backend)
    kept, gone = begin(backend, "more", max_tokens=30), begin(backend, "hello", max_tokens=30)
    waiting = begin(backend, "x", max_tokens=30)
    waiting.gone = True
    for _ in range(5):
        backend.step()
    gone.gone = True
    backend.step()
    assert isinstance(gone.error, Cancelled)
    assert isinstance(waiting.error, Cancelled)
    assert waiting.got == []
    run(backend)
    assert kept.text == alone.text


def test_a_reader_that_does_not_read_rests_and_goes_on_where_it_was(backend):
    """Its text waits without holding up the others, and is the same in the end."""
    whole = begin(backend, "hello", max_tokens=40)
    run(backend)
    slow = begin(backend, "hello", Reader(room=2), max_tokens=40)
    other = begin(backend, "more", max_tokens=40)
    run(backend)
    assert other.ended
    assert not slow.ended
    assert len(slow.got) == 2
    assert not backend.step()
    third = begin(backend, "x", max_tokens=3)
    slow.room = 10**9
    run(backend)
    assert third.ended
    assert slow.text == whole.text


def test_readers_that_do_not_read_keep_nobody_out(llama, monkeypatch):
    """Where others wait, a text that rests loses its place; it waits for another and goes on where it was."""
    monkeypatch.setattr(engine, "REST_S", 0.0)
    backend = load(llama, options={"max_sequences": 2})
    ways = ({}, {"temperature": 1.5, "seed": 7, "repetition_penalty": 1.2})
    whole = [begin(backend, "hello", max_tokens=40, **way) for way in ways]
    run(backend)
    slow = [begin(backend, "hello", Reader(room=2), max_tokens=40, **way) for way in ways]
    run(backend)
    others = [begin(backend, prompt, max_tokens=10) for prompt in PROMPTS]
    run(backend)
    assert all(reader.ended and reader.error is None for reader in others)
    assert [len(reader.got) for reader in slow] == [2, 2]
    last = begin(backend, "hello", max_tokens=10)
    for reader in slow:
        reader.room = 10**9
    run(backend)
    assert last.ended
    assert [reader.text for reader in slow] == [reader.text for reader in whole]


def test_no_text_loses_its_place_in_vain(llama, monkeypatch):
    """Where the one that waits would not fit even so, who rests keeps what the model remembers of it."""
    monkeypatch.setattr(engine, "REST_S", 0.0)
    backend = load(llama, options={"cache_tokens": 40})
    slow = begin(backend, "hello", Reader(room=1), max_tokens=15, ignore_eos=True)
    busy = begin(backend, "hello", max_tokens=15, ignore_eos=True)
    large = begin(backend, "hello", max_tokens=25, ignore_eos=True)
    while backend.step() and not busy.ended:
        assert all(resting.row is not None for resting in backend._engine._resting)
    run(backend)
    assert large.ended
    assert not slow.ended
    assert [resting.row for resting in backend._engine._resting] == [None]


def test_a_short_stall_costs_no_place(llama, monkeypatch):
    """Who waits is patient for a moment with a reader that stalls."""
    assert engine.REST_S > 1
    monkeypatch.setattr(engine, "REST_S", DEADLINE_S)  # as long as that moment may be here
    backend = load(llama, options={"max_sequences": 1})
    slow = begin(backend, "hello", Reader(room=1), max_tokens=10)
    other = begin(backend, "x", max_tokens=10)
    run(backend)
    assert other.got == []
    slow.room = 10**9
    run(backend)
    assert slow.ended
    assert other.ended


def test_the_more_urgent_text_begins_first(llama):
    """Of those that wait for a place the higher priority has the next one, then the earlier."""
    backend = load(llama, options={"max_sequences": 1})
    ends = []

    class Noting(Reader):
        def send(self, outputs, *, last):
            super().send(outputs, last=last)
            if last:
                ends.append(self.name)

    first = Noting()
    first.name = "first"
    begin(backend, "hello", first, max_tokens=5)
    backend.step()
    for name, priority in (("late", -3), ("a", 0), ("b", 0), ("urgent", 7)):
        reader = Noting()
        reader.name, reader.priority = name, priority
        begin(backend, "hello", reader, max_tokens=3)
    run(backend)
    assert ends == ["first", "urgent", "a", "b", "late"]


def test_more_texts_than_there_is_room_for_wait_their_turn(llama):
    """``max_sequences`` bounds what is at work; the rest begins as others end."""
    backend = load(llama, options={"max_sequences": 2})
    readers = [begin(backend, "hello", max_tokens=5, ignore_eos=True) for _ in range(5)]
    for _ in range(5):
        backend.step()
    assert [bool(reader.got) for reader in readers] == [True, True, False, False, False]
    run(backend)
    assert len({reader.text for reader in readers}) == 1


def test_texts_keep_to_the_tokens_that_are_reserved(llama):
    """``cache_tokens`` bounds all texts at work, each taken to become as long as it may; one alone is always taken."""
    backend = load(llama, options={"cache_tokens": 35})
    readers = [begin(backend, "hello", max_tokens=5, ignore_eos=True) for _ in range(5)]
    for _ in range(4):
        backend.step()
    assert [bool(reader.got) for reader in readers] == [True, True, True, False, False]
    run(backend)
    assert all(reader.ended and reader.error is None for reader in readers)
    longest = begin(backend, "hello", max_tokens=1000, ignore_eos=True)
    run(backend)
    assert longest.got[-1]["num_input_tokens"] + longest.got[-1]["num_output_tokens"] == 35
    with pytest.raises(BadInputError, match="cache_tokens"):
        begin(backend, "x" * 36, max_tokens=1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_what_is_reserved_for_a_token_is_what_it_takes(tmp_path, kind):
    """The daemon's estimate from config.json is the size of the library's cache, to the byte."""
    save_model(tmp_path, kind)
    backend = load(tmp_path, max_sequence_length=CONTEXT)
    with torch.inference_mode():
        row, _ = backend._engine._lane.prefill([1, 2, 3, 4, 5])
    layers = row.layers or [(layer.keys, layer.values) for layer in row.cache.layers]
    taken = sum(part.nbytes for pair in layers for part in pair)
    memory = read_config(json.loads((tmp_path / "config.json").read_text()))
    assert memory is not None
    assert memory.token_numbers * memory.number_bytes * 5 == taken


def test_what_fails_fails_alone_or_with_those_of_its_pass(backend):
    """A prompt that makes the model fail is answered so, and the model goes on with others."""
    prefill = backend._engine._lane.prefill
    backend._engine._lane.prefill = lambda tokens, begun: 1 / 0
    bad = begin(backend, "hello", max_tokens=3)
    run(backend)
    assert isinstance(bad.error, ZeroDivisionError)
    backend._engine._lane.prefill = prefill
    good = begin(backend, "hello", max_tokens=3)
    run(backend)
    assert good.error is None
    assert good.ended


def fail_next(backend, monkeypatch, name):
    """Have the memory of those in the lane be too little for what is asked of it next."""
    slab = backend._engine._lane._slab
    made = getattr(slab, name)

    def fail(*_):
        monkeypatch.setattr(slab, name, made)
        raise MemoryError

    monkeypatch.setattr(slab, name, fail)


def test_who_finds_no_room_fails_alone(backend, monkeypatch):
    """One that cannot join those at work is told so; the others write on as if it had never come."""
    alone = begin(backend, "hello", max_tokens=20)
    run(backend)
    first = begin(backend, "hello", max_tokens=20)
    backend.step()
    fail_next(backend, monkeypatch, "_move")
    late = begin(backend, "a longer one", max_tokens=20)
    run(backend)
    assert isinstance(late.error, MemoryError)
    assert (first.text, first.error) == (alone.text, None)


def test_who_comes_back_and_finds_no_room_fails_alone(backend, monkeypatch):
    """So does one that rested."""
    resting = begin(backend, "hello", Reader(room=2), max_tokens=30, ignore_eos=True)
    other = begin(backend, "world", max_tokens=30, ignore_eos=True)
    while not backend._engine._resting:
        backend.step()
    resting.room = 100
    fail_next(backend, monkeypatch, "add")
    run(backend)
    assert isinstance(resting.error, MemoryError)
    assert other.error is None
    assert other.got[-1]["num_output_tokens"] == 30


def test_memory_that_is_short_as_one_rests_costs_those_at_work_and_no_more(backend, monkeypatch):
    """Those that shared its passes are told; nothing of them is left, and who comes next is served."""
    alone = begin(backend, "hello", max_tokens=20)
    run(backend)
    readers = [begin(backend, prompt, max_tokens=30) for prompt in ("hello", "world", "again")]
    while len(backend._engine._running) < 3:
        backend.step()
    readers[0].room = 0
    fail_next(backend, monkeypatch, "copy")
    run(backend)
    assert [type(reader.error) for reader in readers] == [MemoryError] * 3
    assert backend._engine._lane.rows == []
    again = begin(backend, "hello", max_tokens=20)
    run(backend)
    assert (again.text, again.error) == (alone.text, None)


@pytest.mark.parametrize("seed", range(4))
def test_whoever_comes_rests_or_goes_each_text_is_what_it_is_alone(backend, monkeypatch, seed):
    """Random readers, fast and slow, urgent and not: every one that stays has its whole text in the end."""
    monkeypatch.setattr(engine, "REST_S", 0.0)
    monkeypatch.setattr(lanes, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(backend._engine, "_max_sequences", 3)
    alone = {prompt: begin(backend, prompt, max_tokens=15) for prompt in PROMPTS}
    run(backend)
    chance = random.Random(seed)
    readers = {}
    for turn in range(150):
        if turn % 12 == 0:
            reader, prompt = Reader(room=chance.choice((1, 2, 5, 99))), chance.choice(PROMPTS)
            reader.priority = chance.choice((-1, 0, 0, 3))
            readers[begin(backend, prompt, reader, max_tokens=15)] = prompt
        for reader in readers:
            reader.room += chance.random() < 0.15
            reader.gone |= chance.random() < 0.003
        backend.step()
    for reader in readers:
        reader.room = 99
    run(backend)
    for reader, prompt in readers.items():
        assert reader.ended
        if not isinstance(reader.error, Cancelled):
            assert (reader.error, reader.text) == (None, alone[prompt].text)
    assert backend._engine._lane.rows == []
