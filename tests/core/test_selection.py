"""Which files are fetched: repositories as they are, and what is left out and why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.selection import Selection, select
from tests.core.attempt import attempt

MINILM = [
    ".gitattributes", "1_Pooling/config.json", "README.md", "config.json",
    "config_sentence_transformers.json", "data_config.json", "model.safetensors", "modules.json",
    "onnx/model.onnx", "onnx/model_O1.onnx", "openvino/openvino_model.bin",
    "openvino/openvino_model.xml", "pytorch_model.bin", "rust_model.ot", "sentence_bert_config.json",
    "special_tokens_map.json", "tf_model.h5", "tokenizer.json", "tokenizer_config.json",
    "train_script.py", "vocab.txt",
]  # fmt: skip
MINILM_CHOSEN = {
    "1_Pooling/config.json", "README.md", "config.json", "config_sentence_transformers.json",
    "data_config.json", "model.safetensors", "modules.json", "sentence_bert_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
}  # fmt: skip


def left_out(selection: Selection, path: str) -> str:
    """Return why a path was left out."""
    return dict(selection.skipped)[path]


def test_a_sentence_encoder_is_fetched_without_its_copies() -> None:
    """All of MiniLM that is needed, and a reason for the rest."""
    selection = select(MINILM)
    assert set(selection.chosen) == MINILM_CHOSEN
    assert [p for p in MINILM if p in selection.chosen] == list(selection.chosen)
    assert len(selection.skipped) == len(MINILM) - len(MINILM_CHOSEN)
    assert all(why for _, why in selection.skipped)
    assert "pickle" in left_out(selection, "pytorch_model.bin")
    assert "ONNX" in left_out(selection, "onnx/model.onnx")
    assert "code" in left_out(selection, "train_script.py")


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "model.fp16.safetensors"], {"model.safetensors"}),
        (["model.fp16.safetensors", "model.bf16.safetensors"], {"model.bf16.safetensors"}),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "model.fp16-00001-of-00002.safetensors",
                "model.fp16-00002-of-00002.safetensors",
                "model.safetensors.index.fp16.json",
            ],
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
        ),
        (
            [
                "model.safetensors",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
            {"model.safetensors"},
        ),
        (
            [
                "consolidated.safetensors",
                "model-00001-of-00001.safetensors",
                "original/params.json",
            ],
            {"model-00001-of-00001.safetensors"},
        ),
        (["consolidated.safetensors", "params.json"], {"consolidated.safetensors"}),
        (
            [
                "model_index.json",
                "sd_xl_base_1.0.safetensors",
                "unet/diffusion_pytorch_model.safetensors",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "vae/diffusion_pytorch_model.fp16.safetensors",
                "scheduler/scheduler_config.json",
            ],
            {
                "unet/diffusion_pytorch_model.safetensors",
                "vae/diffusion_pytorch_model.fp16.safetensors",
            },
        ),
        (["a.safetensors", "tiny.Q4_K_M.gguf"], {"a.safetensors"}),
        (["x.Q8_0.gguf", "x.Q4_K_M.gguf", "mmproj-x.gguf"], {"x.Q4_K_M.gguf", "mmproj-x.gguf"}),
        (["adapter_model.safetensors", "optimizer.pt"], {"adapter_model.safetensors"}),
        (["checkpoint-500/model.safetensors", "model.safetensors"], {"model.safetensors"}),
    ],
)
def test_one_copy_of_the_weights_is_chosen(files: list[str], weights: set[str]) -> None:
    """One precision, one layout, one quantisation."""
    chosen = select(files).chosen
    assert {path for path in chosen if path.endswith((".safetensors", ".gguf"))} == weights


def test_an_index_goes_with_its_shards() -> None:
    """Kept with them, left out without them."""
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert index in select([*shards, index]).chosen
    assert index not in select(["model.safetensors", *shards, index]).chosen
    pickle_index = "pytorch_model.bin.index.json"
    files = [*shards, index, pickle_index, "pytorch_model-00001-of-00001.bin"]
    assert pickle_index not in select(files).chosen


def test_scheduler_configs_are_no_training_leftovers() -> None:
    """A diffusion pipeline needs them; a trainer's state nobody needs."""
    files = [
        "scheduler/scheduler_config.json",
        "trainer_state.json",
        "runs/x/events.out.tfevents.1",
    ]
    chosen = select([*files, "model.safetensors"]).chosen
    assert chosen == ("scheduler/scheduler_config.json", "model.safetensors")


def test_only_pickles_is_refused_before_a_byte() -> None:
    """UNSAFE_FILE names the first and what to do."""
    with pytest.raises(ModelhostError) as caught:
        select(["config.json", "pytorch_model.bin", "x.pt"], source="hf://org/old")
    assert caught.value.reason is Reason.UNSAFE_FILE
    assert caught.value.metadata["file"] == "pytorch_model.bin"
    assert caught.value.metadata["source"] == "hf://org/old"


def test_pickles_come_when_the_operator_allowed_them() -> None:
    """Only where nothing safe says the same."""
    assert "pytorch_model.bin" in select(["pytorch_model.bin"], allow_unsafe=True).chosen
    both = select(["pytorch_model.bin", "model.safetensors"], allow_unsafe=True)
    assert both.chosen == ("model.safetensors",)


def test_weights_of_other_frameworks_only_are_named() -> None:
    """The error says which framework, not that files are missing."""
    with pytest.raises(ModelhostError) as caught:
        select(["config.json", "onnx/model.onnx"])
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL
    assert "ONNX" in caught.value.message


def test_patterns_choose_exactly() -> None:
    """Allow patterns replace the default choice, a trailing slash means everything below."""
    files = ["a.safetensors", "a.fp16.safetensors", "onnx/m.onnx", "x.csv"]
    assert select(files, ["*.fp16.safetensors"]).chosen == ("a.fp16.safetensors",)
    assert select(files, ["onnx/"]).chosen == ("onnx/m.onnx",)
    assert select(files, ["*"], ["*.safetensors", "onnx/"]).chosen == ("x.csv",)
    assert select(files, (), ["a.safetensors"]).chosen == ("a.fp16.safetensors",)


def test_patterns_do_not_let_pickles_or_code_in() -> None:
    """Asking for them by name is not the operator's permission."""
    with pytest.raises(ModelhostError) as caught:
        select(["pytorch_model.bin", "model.safetensors"], ["*.bin"])
    assert caught.value.reason is Reason.UNSAFE_FILE
    assert select(["m.py", "m.safetensors"], ["m.*"]).chosen == ("m.safetensors",)


def test_patterns_that_match_nothing_say_so() -> None:
    """SOURCE_NOT_FOUND: files."""
    with pytest.raises(ModelhostError) as caught:
        select(["model.safetensors"], ["*.nothing"])
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND
    assert caught.value.metadata["missing"] == "files"


@pytest.mark.parametrize("patterns", [["x"] * 65, ["x" * 257], [""], ["a\0b"]])
def test_patterns_have_bounds(patterns: list[str]) -> None:
    """Count, length, no empty one, no NUL."""
    with pytest.raises(ModelhostError) as caught:
        select(["model.safetensors"], patterns)
    assert caught.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["../../x.safetensors", "/x.safetensors", "a\\b.safetensors"])
def test_a_hostile_name_that_would_be_fetched_refuses_the_plan(name: str) -> None:
    """Left out by a pattern it is only listed, escaped."""
    files = ["model.safetensors", name]
    with pytest.raises(ModelhostError) as caught:
        select(files)
    assert caught.value.reason is Reason.UNSAFE_FILE
    ignored = select(files, (), [name])
    assert ignored.chosen == ("model.safetensors",)
    assert ignored.skipped[0][0].startswith("'")


NAMES = st.text("ab./-_AB0", min_size=1, max_size=12)
SUFFIXES = st.sampled_from(
    [".safetensors", ".json", ".bin", ".py", ".gguf", ".onnx", "", ".fp16.safetensors"]
)


@given(
    st.lists(st.builds(str.__add__, NAMES, SUFFIXES), unique=True, max_size=12),
    st.lists(st.text("ab*?[]!./-", min_size=1, max_size=8), max_size=3),
    st.lists(st.text("ab*?[]!./-", min_size=1, max_size=8), max_size=3),
    st.booleans(),
)
def test_every_file_is_chosen_or_skipped_with_a_reason(
    files: list[str], allow: list[str], ignore: list[str], unsafe: bool
) -> None:
    """Nothing is lost, nothing is chosen twice, pickles and code only with permission."""
    selection = attempt(lambda: select(files, allow, ignore, allow_unsafe=unsafe))
    if isinstance(selection, ModelhostError):
        refusals = {Reason.UNSAFE_FILE, Reason.SOURCE_NOT_FOUND, Reason.UNSUPPORTED_MODEL}
        assert selection.reason in refusals
        return
    assert len(selection.chosen) + len(selection.skipped) == len(files)
    assert set(selection.chosen) <= set(files)
    if not unsafe:
        assert not [p for p in selection.chosen if p.endswith((".bin", ".py"))]
