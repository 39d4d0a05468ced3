"""Text generation in this process: each text as the library's own ``generate`` writes it, however many at once."""

import numpy as np
import pytest
import torch

from modelhostd.worker.backend import BadInputError, InferContext, Tensor
from modelhostd.worker.backends.generation.text_stream import TextStream
from tests.worker.generation_models import (
    CONFIGS,
    CONTEXT,
    PROMPTS,
    Reader,
    begin,
    expected,
    flag,
    load,
    run,
    save_model,
    texts,
)

pytestmark = pytest.mark.timeout(900)
"""The first one imports a library for seconds, which on a swamped machine is more than a minute."""


@pytest.fixture
def backend(llama):
    made = load(llama)
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


def test_the_end_token_ends_it(llama, backend):
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
    half = '{"\\ud800": 2}', '{"stop": "\\ud800"}'
    endless = "[" * 100_000, '"' + "x" * 70_000 + '"'
    for encoded in ('{"n": 2}', *half, "[1]", "{", b"\xff", *endless):
        with pytest.raises(BadInputError):
            begin(backend, "hello", inputs={"sampling_parameters": texts(encoded)})


def test_prompts_that_cannot_be_used_are_refused(backend):
    """One that fills the context, an empty one and one that is no text are named with their length."""
    with pytest.raises(BadInputError) as caught:
        begin(backend, "x" * CONTEXT)
    assert (caught.value.field, caught.value.actual) == ("text_input", CONTEXT)
    assert caught.value.expected == f"1 to {CONTEXT - 1} tokens"
    with pytest.raises(BadInputError) as caught:
        begin(backend, "x" * 2**20)
    assert (caught.value.field, caught.value.actual) == ("text_input", f"more than {CONTEXT - 1}")
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


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_other_precisions(llama, precision):
    """A model is loaded in half of the bytes where that is asked for, and still writes."""
    whole = load(llama)
    half = load(llama, precision=precision)
    # Each weight begins at an alignment of its own.
    assert half.measured_bytes <= whole.measured_bytes / 2 + 4096
    reader = begin(half, "hello", max_tokens=5)
    run(half)
    assert reader.ended
    assert reader.error is None
    assert half.torch_module() is not None


def test_options_are_checked(llama):
    """An unknown option and one out of range are refused; a number is one however it comes over the wire."""
    load(llama, options={"max_sequences": 2.0, "cache_tokens": 40.0}).unload()
    whole = (
        {"max_sequences": 0},
        {"cache_tokens": 0},
        {"cache_tokens": 1.5},
        {"max_sequences": True},
    )
    for options in (*whole, {"max_sequences": "many"}, {"sequences": 3}):
        with pytest.raises(BadInputError):
            load(llama, options=options)


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
