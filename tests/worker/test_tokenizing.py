"""A tokenizer is read once for a model that leaves and comes back, and reading it lets others run where it can."""

import gc
import io
import json
import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import Reason
from modelhostd.worker import process
from modelhostd.worker.backend import Backend
from modelhostd.worker.backends import tokenizing
from modelhostd.worker.backends.building import read_config
from modelhostd.worker.backends.tokenizing import Shelf, memory_of, read_tokenizer
from modelhostd.worker.executor import Executor
from modelhostd.worker.imaging import Imaging
from modelhostd.worker.loader import Loader
from modelhostd.worker.process import drop_spare, drops_when_short
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.blackbox import PAGE_BYTES, BlackBox
from modelhostd.worker.wire.frames import Frame, Kind
from tests.support import wait_until
from tests.worker import generation_models
from tests.worker.bert import ask, load

MB = 10**6
TEXTS = ["a cat sits on the mat.", "the cat", "nothing of this is known"]


@pytest.fixture
def read():
    """The folders whose tokenizers were read."""
    return []


@pytest.fixture
def shelf(read, monkeypatch):
    """Give the shelf that the backend uses in this test."""

    def reads(folder):
        read.append(folder)
        return read_tokenizer(folder)

    shelf = Shelf(reads, memory_of, 64 * MB)
    monkeypatch.setattr("modelhostd.worker.backends.transformers.SHELF", shelf)
    return shelf


def folder_of(at, name, contents="words"):
    """Write a model's folder of one file."""
    (at / name).mkdir()
    (at / name / "tokenizer.json").write_text(contents)
    return at / name


@pytest.fixture
def spare(monkeypatch):
    """Have what is dropped where memory is short be this test's alone."""
    monkeypatch.setattr(process, "_spare", [])


def objects(max_bytes=MB, most=4):
    """Return a shelf whose tokenizers are what their file has, and take as many bytes."""
    return Shelf(
        lambda folder: list((folder / "tokenizer.json").read_bytes()), len, max_bytes, most
    )


# --- what is kept ---------------------------------------------------------------------------------


def test_a_model_that_comes_back_does_not_read_its_tokenizer_again(tiny, tmp_path, shelf, read):
    """Nor does another of the same files, wherever they lie; the answers are the same to the bit."""
    first = load(tiny)
    answers = ask(first, TEXTS)["embedding"]
    assert first.health_check().ok
    first.unload()
    copy = shutil.copytree(tiny, tmp_path / "copy")
    second = load(copy)
    assert (ask(second, TEXTS)["embedding"] == answers).all()
    assert read == [tiny]


def test_other_files_are_another_tokenizer(tiny, tmp_path, shelf, read):
    """One word more, in any file that the library may read, and it is read."""
    backend = load(tiny)
    assert backend.health_check().ok
    backend.unload()
    other = shutil.copytree(tiny, tmp_path / "other")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 7}))
    assert "cut to 7 tokens" in load(other).signature().inputs[0].description
    assert read == [tiny, other]


def test_two_models_at_a_time_have_a_tokenizer_each(tiny, shelf, read):
    """It remembers how it was last called, so it is in the hands of one; when both have gone, one is kept."""
    models = load(tiny), load(tiny)
    assert len({id(model._tokenizer) for model in models}) == 2
    for model in models:
        assert model.health_check().ok
        held = shelf.held_bytes
        model.unload()
    assert 0 < held == shelf.held_bytes
    assert read == [tiny, tiny]


def test_the_tokenizer_of_a_model_that_is_not_well_goes_with_it(tiny, shelf, read):
    """Who is reloaded since its answers changed gets nothing that had a part in them."""
    backend = load(tiny)
    assert backend.health_check().ok
    backend._canary = {name: part + 1 for name, part in backend._canary.items()}
    assert not backend.health_check().ok
    backend.unload()
    load(tiny)
    assert read == [tiny, tiny]


def test_how_it_was_called_does_not_show_when_it_comes_back(tiny):
    """Texts that one model had cut and padded are whole for the next one."""
    shelf = Shelf(read_tokenizer, memory_of, 64 * MB)
    taken = shelf.take(tiny)
    expected = read_tokenizer(tiny)(TEXTS)["input_ids"]
    taken.tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")
    shelf.give_back(taken)
    again = shelf.take(tiny)
    assert again is taken
    assert again.tokenizer(TEXTS)["input_ids"] == expected


def test_what_one_task_set_does_not_show_when_it_comes_back_for_another(tmp_path, monkeypatch):
    """A tokenizer without a token for padding is given one for embeddings; a chat template is told of none, as before."""
    shelf = Shelf(read_tokenizer, memory_of, 64 * MB)
    monkeypatch.setattr("modelhostd.worker.backends.transformers.SHELF", shelf)
    generation_models.save_model(tmp_path)
    expected = read_tokenizer(tmp_path)
    backend = load(tmp_path)
    assert backend.health_check().ok
    backend.unload()
    assert shelf.held_bytes
    tokenizer = shelf.take(tmp_path).tokenizer
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    assert tokenizer.get_added_vocab() == expected.get_added_vocab()


def test_weights_have_no_part_in_what_a_tokenizer_is(tmp_path):
    """A fine-tuned model shares the tokenizer of what it was tuned from; a name that differs does not."""
    shelf = objects()
    one, other, third = (folder_of(tmp_path, name) for name in ("one", "other", "third"))
    (other / "model.safetensors").write_text("weights")
    (third / "tokenizer.json").rename(third / "tekken.json")
    (third / "tokenizer.json").touch()
    taken = shelf.take(one)
    shelf.give_back(taken)
    assert shelf.take(third) is not taken
    assert shelf.take(other) is taken


# --- limits ---------------------------------------------------------------------------------------


def test_so_many_are_kept_and_the_one_that_left_first_goes(tmp_path):
    """Neither number nor bytes pass their limit."""
    folders = [folder_of(tmp_path, str(number), f"{number}" * 100) for number in range(4)]
    by_number, by_bytes = objects(most=2), objects(max_bytes=250)
    for shelf in (by_number, by_bytes):
        taken = [shelf.take(folder) for folder in folders]
        for one in taken:
            shelf.give_back(one)
        assert shelf.held_bytes == 200
        assert [shelf.take(folder) is one for folder, one in zip(folders, taken, strict=True)] == [
            False, False, True, True,
        ]  # fmt: skip
        assert shelf.held_bytes == 0


def test_what_is_larger_than_all_the_room_drives_nothing_out(tmp_path, monkeypatch):
    """It goes with its model; so does one whose files are too many bytes to be looked at."""
    shelf = objects(max_bytes=250)
    small, large = folder_of(tmp_path, "small", "w" * 100), folder_of(tmp_path, "large", "w" * 300)
    kept = shelf.take(small)
    shelf.give_back(kept)
    shelf.give_back(shelf.take(large))
    monkeypatch.setattr(tokenizing, "MAX_FILE_BYTES", 99)
    unknown = shelf.take(small)
    shelf.give_back(unknown)
    assert shelf.held_bytes == 100
    monkeypatch.undo()
    assert shelf.take(small) is kept is not unknown


def test_where_memory_was_short_none_is_kept(tmp_path, spare):
    """A load that found no memory has all go that is kept only to be faster."""
    shelf = objects()
    drops_when_short(shelf.clear)
    shelf.give_back(shelf.take(folder_of(tmp_path, "one")))
    assert shelf.held_bytes
    drop_spare()
    assert not shelf.held_bytes


def test_the_memory_of_a_tokenizer_is_told_by_its_kind_and_its_words(minilm):
    """What the library names as no kind that was measured counts as the largest."""
    tokenizer = read_tokenizer(minilm)
    assert memory_of(tokenizer) == 30_522 * 400
    assert memory_of(["word"] * 10) == 13_000


class Poor(Backend):
    """Cannot be loaded."""

    signature = infer = health_check = None  # type: ignore[assignment]

    def __init__(self, error) -> None:
        self.error = error

    def load(self, context):
        """Raise."""
        raise self.error

    def unload(self) -> None:
        """Have nothing."""


@pytest.mark.parametrize(("error", "kept"), [(MemoryError(), False), (ValueError("odd"), True)])
def test_only_a_load_without_memory_empties_the_shelf(tmp_path, spare, error, kept):
    """One that fails of anything else leaves what is kept."""
    shelf = objects()
    drops_when_short(shelf.clear)
    shelf.give_back(shelf.take(folder_of(tmp_path, "one")))
    failures = []

    class Told:
        def send_error(self, request, generation, failure):
            failures.append(failure.reason)

    class Kinds:
        def choose(self, model, backend, task):
            return "poor", lambda: Poor(error)

    box = BlackBox(memoryview(bytearray(PAGE_BYTES)))
    loader = Loader("cpu", Kinds(), Executor(1, 1, box, print), None, Imaging("cpu"), Told(), box)
    header = worker_pb2.LoadHeader(model="m", instance="m", model_dir=str(tmp_path))
    loader.load(Frame(Kind.LOAD, frames.FINAL, 1, 1, header.SerializeToString(), b""))
    wait_until(lambda: failures)
    assert failures == [Reason.LOAD_FAILED if kept else Reason.OUT_OF_DEVICE_MEMORY]
    assert bool(shelf.held_bytes) is kept


# --- reading --------------------------------------------------------------------------------------


def test_the_library_reads_numbers_through_functions_of_ours(minilm, monkeypatch):
    """So other threads can run while it reads JSON; what comes of it is what the library makes by itself."""
    from transformers import AutoTokenizer, tokenization_utils_base, tokenization_utils_tokenizers

    modules = tokenization_utils_base, tokenization_utils_tokenizers
    read_tokenizer(minilm)
    for module in modules:
        monkeypatch.setattr(module, "json", json)
    plain = AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    monkeypatch.undo()
    numbers = []
    monkeypatch.setattr(tokenizing, "_whole", lambda digits: numbers.append(digits) or int(digits))
    ours = read_tokenizer(minilm)
    assert len(numbers) >= 2 * 30_522
    assert ours.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert {**ours.init_kwargs} == {**plain.init_kwargs}
    assert ours(TEXTS) == plain(TEXTS)


def test_nothing_is_collected_while_the_library_reads_what_may_import(tiny, monkeypatch):
    """A configuration or a tokenizer can be the first to need a thousand modules, all of which a collection looks at."""
    from transformers import AutoConfig, AutoTokenizer

    on = []
    for kind in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: on.append(gc.isenabled()))
    read_config(tiny)
    read_tokenizer(tiny)
    assert (on, gc.isenabled()) == ([False, False], True)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_json_is_read_as_ever(value):
    """Values of all kinds, of the same types."""
    found = tokenizing._load(io.StringIO(json.dumps(value)))
    assert repr(found) == repr(value)


def test_what_is_no_number_is_read_as_ever():
    """NaN and the infinities, which the library's files may have."""
    found = tokenizing._load(io.StringIO("[NaN, Infinity, -Infinity]"))
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, -math.inf]
