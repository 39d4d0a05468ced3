"""Text generation in this process: each text as the library's own ``generate`` writes it, however many at once."""

import json

import numpy as np
import pytest
import torch

from modelhostd.core.text_memory import read_config
from modelhostd.worker.backend import BadInputError, Cancelled, InferContext, Tensor
from modelhostd.worker.backends.generation import engine
from modelhostd.worker.backends.generation.text_stream import TextStream
from tests.worker.generation_models import (
    CONFIGS,
    CONTEXT,
    Reader,
    begin,
    expected,
    flag,
    load,
    run,
    save_model,
    texts,
)

pytestmark = pytest.mark.timeout(300)
"""The first one imports a library for seconds, which on a swamped machine is more than a minute."""

PROMPTS = ("hello", "a much longer prompt, it is", "x", "more of it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return folder


@pytest.fixture
def backend(folder):
    made = load(folder)
    yield made
    made.unload()


@pytest.mark.parametrize("kind", CONFIGS)
def test_texts_side_by_side_are_what_each_is_alone(kind, tmp_path):
    """Prompts of other lengths that begin at other times share passes, and each text is the library's."""
    model = save_model(tmp_path, kind)
    backend = load(tmp_path, max_sequence_length=CONTEXT)
    assert backend.health_check().ok
    readers = []
    for number, prompt in enumerate(PROMPTS):
        readers.append(begin(backend, prompt, max_tokens=20 + number))
        backend.step()
        backend.step()
    run(backend)
    for number, (prompt, reader) in enumerate(zip(PROMPTS, readers, strict=True)):
        text, count = expected(model, tmp_path, prompt, 20 + number)
        assert (reader.text, reader.error) == (text, None)
        assert reader.got[-1]["num_output_tokens"] == count
        assert reader.got[-1]["num_input_tokens"] == len(prompt)
    assert backend.health_check().ok


def test_a_whole_answer_is_the_pieces_together(backend):
    """Without ``stream``, or where one answer is wanted, the text comes in one."""
    pieces = begin(backend, "hello", max_tokens=30)
    whole = begin(backend, "hello", inputs={"stream": flag(False)}, max_tokens=30)
    unary = begin(backend, "hello", Reader(streaming=False), max_tokens=30)
    prefixed = {"stream": flag(False), "exclude_input_in_output": flag(False)}
    with_prompt = begin(backend, "hello", inputs=prefixed, max_tokens=30)
    run(backend)
    assert len(pieces.got) > 3
    assert [one["finish_reason"] for one in pieces.got[:-1]] == [b""] * (len(pieces.got) - 1)
    assert len(whole.got) == len(unary.got) == 1
    assert whole.got == unary.got
    assert whole.text == pieces.text
    assert with_prompt.text == b"hello" + whole.text
    assert whole.got[0]["finish_reason"] == b"length"
    outputs = backend.infer({"text_input": texts("hello")}, InferContext({"max_tokens": 30}))
    assert outputs["text_output"][0] == whole.text


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


def test_readers_that_do_not_read_keep_nobody_out(folder, monkeypatch):
    """Where others wait, a text that rests loses its place; it waits for another and goes on where it was."""
    monkeypatch.setattr(engine, "REST_S", 0.0)
    backend = load(folder, options={"max_sequences": 2})
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


def test_a_short_stall_costs_no_place(folder):
    """Who waits is patient for a moment with a reader that stalls."""
    backend = load(folder, options={"max_sequences": 1})
    slow = begin(backend, "hello", Reader(room=1), max_tokens=10)
    other = begin(backend, "x", max_tokens=10)
    run(backend)
    assert other.got == []
    slow.room = 10**9
    run(backend)
    assert slow.ended
    assert other.ended


def test_the_more_urgent_text_begins_first(folder):
    """Of those that wait for a place the higher priority has the next one, then the earlier."""
    backend = load(folder, options={"max_sequences": 1})
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


def test_more_texts_than_there_is_room_for_wait_their_turn(folder):
    """``max_sequences`` bounds what is at work; the rest begins as others end."""
    backend = load(folder, options={"max_sequences": 2})
    readers = [begin(backend, "hello", max_tokens=5, ignore_eos=True) for _ in range(5)]
    for _ in range(5):
        backend.step()
    assert [bool(reader.got) for reader in readers] == [True, True, False, False, False]
    run(backend)
    assert len({reader.text for reader in readers}) == 1


def test_texts_keep_to_the_tokens_that_are_reserved(folder):
    """``cache_tokens`` bounds all texts at work, each taken to become as long as it may; one alone is always taken."""
    backend = load(folder, options={"cache_tokens": 35})
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


def test_a_seed_decides_and_company_does_not(backend):
    """The same seed gives the same text, alone and among others; another one gives another."""
    one = begin(backend, "hello", max_tokens=20, temperature=1.5, seed=7)
    run(backend)
    readers = [begin(backend, "hello", max_tokens=20, temperature=1.5, seed=s) for s in (8, 7, 9)]
    begin(backend, "x", max_tokens=9)
    run(backend)
    assert readers[1].text == one.text
    assert len({reader.text for reader in readers}) == 3


def test_what_leaves_one_choice_is_the_likeliest(backend):
    """``top_k`` 1, a tiny ``top_p`` and a temperature near 0 all end at the greedy text."""
    greedy = begin(backend, "hello", max_tokens=20)
    colds = ({"temperature": 1e-4}, {"temperature": 1e-300})
    ways = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, *colds)
    readers = [begin(backend, "hello", max_tokens=20, **{"temperature": 1.0, **w}) for w in ways]
    penalty = begin(backend, "hello", max_tokens=20, repetition_penalty=50.0)
    run(backend)
    assert {reader.text for reader in readers} == {greedy.text}
    assert penalty.text != greedy.text


def test_parameters_come_as_json_too(backend):
    """Input ``sampling_parameters`` says the same, numbers as texts as well; request parameters go before it."""
    plain = begin(backend, "hello", max_tokens=6, temperature=0.7, seed=3)
    given = {"sampling_parameters": texts('{"max_tokens": "9", "temperature": "0.7", "seed": 3}')}
    coded = begin(backend, "hello", inputs=given, max_tokens=6)
    run(backend)
    assert coded.text == plain.text


def test_a_stop_text_ends_it_and_is_not_in_it(backend):
    """Nothing of a stop text is sent, also where it comes in several pieces."""
    free = begin(backend, "hello", max_tokens=40)
    run(backend)
    text = free.text.decode()
    stop = text[10:13]
    stopped = begin(backend, "hello", max_tokens=40, stop=stop)
    run(backend)
    assert stopped.text.decode() == text[: text.find(stop)]
    assert stopped.got[-1]["finish_reason"] == b"stop"


def test_the_end_token_ends_it(folder, backend):
    """A text ends at the model's end token, unless that is to be ignored."""
    rows = backend._model.lm_head.weight
    kept = rows[257].clone()
    with torch.no_grad():
        rows[257] = rows.sum(0) * 100 + 100
    ended = begin(backend, "hello", max_tokens=40)
    run(backend)
    ignored = begin(backend, "hello", max_tokens=40, ignore_eos=True)
    run(backend)
    with torch.no_grad():
        rows[257] = kept
    if ended.got[-1]["finish_reason"] == b"stop":
        assert ended.got[-1]["num_output_tokens"] <= ignored.got[-1]["num_output_tokens"]
    assert ignored.got[-1]["finish_reason"] == b"length"
    assert ignored.got[-1]["num_output_tokens"] == 40


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", 10**12),
        ("max_tokens", "9" * 5000),
        ("seed", -1),
        ("seed", 2**63),
        ("repetition_penalty", 0),
        ("stop", ""),
        ("stop", "x" * 257),
        ("ignore_eos", 1),
    ],
)
def test_a_parameter_out_of_its_range_is_named(backend, name, value):
    """Parameter, expected and actual stand in the refusal; nothing was begun."""
    with pytest.raises(BadInputError) as caught:
        begin(backend, "hello", **{name: value})
    assert caught.value.field == f"parameters[{name}]"
    assert caught.value.expected
    assert not backend.step()


def test_unknown_parameters_are_refused(backend):
    """A parameter that nobody knows is named, with those that there are; so in JSON."""
    with pytest.raises(BadInputError) as caught:
        begin(backend, "hello", temprature=1.0)
    assert caught.value.field == "parameters[temprature]"
    assert "temperature" in caught.value.expected
    for encoded in ('{"n": 2}', "[1]", "{", "[" * 100_000, b"\xff", '"' + "x" * 70_000 + '"'):
        with pytest.raises(BadInputError):
            begin(backend, "hello", inputs={"sampling_parameters": texts(encoded)})


def test_prompts_that_cannot_be_used_are_refused(backend):
    """One that fills the context, an empty one and one that is no text are named with their length."""
    with pytest.raises(BadInputError) as caught:
        begin(backend, "x" * CONTEXT)
    assert (caught.value.field, caught.value.actual) == ("text_input", CONTEXT)
    assert caught.value.expected == f"1 to {CONTEXT - 1} tokens"
    with pytest.raises(BadInputError):
        begin(backend, "")
    with pytest.raises(BadInputError) as caught:
        begin(backend, b"\xff\xfe")
    assert caught.value.field == "text_input[0]"


def test_the_context_ends_a_text(backend):
    """A text goes no further than the model's context, whatever was asked."""
    reader = begin(backend, "x" * (CONTEXT - 5), max_tokens=1000, ignore_eos=True)
    run(backend)
    assert reader.got[-1]["num_output_tokens"] == 5
    assert reader.got[-1]["finish_reason"] == b"length"


def test_what_fails_fails_alone_or_with_those_of_its_pass(backend):
    """A prompt that makes the model fail is answered so, and the model goes on with others."""
    prefill = backend._engine._lane.prefill
    backend._engine._lane.prefill = lambda tokens: 1 / 0
    bad = begin(backend, "hello", max_tokens=3)
    run(backend)
    assert isinstance(bad.error, ZeroDivisionError)
    backend._engine._lane.prefill = prefill
    good = begin(backend, "hello", max_tokens=3)
    run(backend)
    assert good.error is None
    assert good.ended


def fail_next_move(backend, monkeypatch):
    """Have the next one that joins or leaves those in the lane find too little memory."""
    lane, made = backend._engine._lane, backend._engine._lane._join_layers

    def fail(layers):
        monkeypatch.setattr(lane, "_join_layers", made)
        raise MemoryError

    monkeypatch.setattr(lane, "_join_layers", fail)


def test_who_finds_no_room_fails_alone(backend, monkeypatch):
    """One that cannot join those at work is told so; the others write on as if it had never come."""
    alone = begin(backend, "hello", max_tokens=20)
    run(backend)
    first = begin(backend, "hello", max_tokens=20)
    backend.step()
    fail_next_move(backend, monkeypatch)
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
    fail_next_move(backend, monkeypatch)
    run(backend)
    assert isinstance(resting.error, MemoryError)
    assert other.error is None
    assert other.got[-1]["num_output_tokens"] == 30


def test_memory_that_is_short_as_one_leaves_costs_those_at_work_and_no_more(backend, monkeypatch):
    """Those that shared its passes are told; nothing of them is left, and who comes next is served."""
    alone = begin(backend, "hello", max_tokens=20)
    run(backend)
    readers = [begin(backend, prompt, max_tokens=30) for prompt in ("hello", "world", "again")]
    while len(backend._engine._running) < 3:
        backend.step()
    readers[0].gone = True
    fail_next_move(backend, monkeypatch)
    run(backend)
    assert [type(reader.error) for reader in readers] == [MemoryError] * 3
    assert backend._engine._lane.rows == []
    again = begin(backend, "hello", max_tokens=20)
    run(backend)
    assert (again.text, again.error) == (alone.text, None)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_other_precisions(folder, precision):
    """A model is loaded in half of the bytes where that is asked for, and still writes."""
    whole = load(folder)
    half = load(folder, precision=precision)
    # Each weight begins at an alignment of its own.
    assert half.measured_bytes <= whole.measured_bytes / 2 + 4096
    reader = begin(half, "hello", max_tokens=5)
    run(half)
    assert reader.ended
    assert reader.error is None
    assert half.torch_module() is not None


def test_options_are_checked(folder):
    """An unknown option and one out of range are refused."""
    wrong = ({"max_sequences": 0}, {"max_sequences": "many"}, {"sequences": 3}, {"cache_tokens": 0})
    for options in wrong:
        with pytest.raises(BadInputError):
            load(folder, options=options)


def test_pieces_are_whole_characters():
    """A character of several tokens comes when it is whole; what never becomes one comes at the end."""

    class Bytes:
        def decode(self, tokens, **_):
            return bytes(tokens).decode(errors="replace")

    stream = TextStream(Bytes(), b"ab", [], skip_special=True)
    pieces = [stream.push(byte) for byte in "é€x".encode()] + [stream.push(0xE2), stream.end()]
    assert pieces == ["", "é", "", "", "€", "x", "", "\ufffd"]


def test_stop_texts_are_held_back_only_as_long_as_they_may_come():
    """What turns out not to be the stop is sent; of two stops the first in the text counts."""

    class Letters:
        def decode(self, tokens, **_):
            return "".join(map(chr, tokens))

    stream = TextStream(Letters(), [], ["<end>", "nd!"], skip_special=True)
    pieces = [stream.push(ord(letter)) for letter in "a<en<end>"]
    assert "".join(pieces) == "a<en"
    assert pieces[:4] == ["a", "", "", ""]
    assert stream.stopped
    assert stream.end() == ""


def test_flags_are_tensors(backend):
    """``stream`` is a BOOL tensor of one element."""
    assert Tensor("BOOL", np.array([True])).array.shape == flag(True).array.shape
    (spec,) = [one for one in backend.signature().inputs if one.name == "stream"]
    assert (spec.datatype, spec.shape, spec.optional) == ("BOOL", (1,), True)
    assert "have at most 96 tokens" in backend.signature().inputs[0].description
