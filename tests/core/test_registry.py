"""Models as values: checked, created, changed, given artifacts and versions."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    LIVE_CONFIG_FIELDS,
    ArtifactState,
    Kind,
    Model,
    ModelConfig,
    Slot,
    Source,
)
from modelhostd.core.state import Edit, State

SOURCE = Source("hf://org/x")
DEVICES = {"sim-0", "cpu"}


def spec(**config: object) -> rules.ModelSpec:
    return rules.ModelSpec(source=SOURCE, config=ModelConfig(**config))  # type: ignore[arg-type]


def made(**fields: object) -> Model:
    return Model("a", "12345678-uid", SOURCE, 1.0, 1.0, **fields)  # type: ignore[arg-type]


def field_of(refused: rules.ModelSpec) -> str:
    with pytest.raises(ModelhostError) as caught:
        rules.check_spec(refused)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    return caught.value.metadata["field"]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_batch_size", (1, 65_536), (0, -1, 65_537)),
        ("max_sequence_length", (1, 16_777_216), (0, 16_777_217)),
        ("queue_limit", (1, 65_536), (0, 65_537)),
        ("keep_alive_s", (0.0, -1.0, 1e8), (math.nan, math.inf, -math.inf, 1e12)),
        ("load_timeout_s", (0.001, 60.0), (0.0, -1.0, math.nan, math.inf)),
        ("max_batch_delay_s", (0.0, 10.0), (-0.1, 10.1, math.nan)),
        ("priority", (-100, 100), (-101, 101)),
        ("precision", ("", "fp32", "fp16", "bf16"), ("int8", "FP32", "fp32 ")),
        ("device", ("", "cuda-0", "cpu"), ("CUDA:0", "../x", "devices/cpu")),
        ("backend", ("", "x" * 64), ("x" * 65, "a\x00b")),
    ],
)
def test_config_fields_have_ranges(name: str, good: tuple[object], bad: tuple[object]) -> None:
    """Each config field takes its range and refuses what is beside it, NaN and infinity too; the contract's name is told."""
    path = f"model.config.{name.removesuffix('_s')}"
    for value in good:
        rules.check_spec(spec(**{name: value}))
    for value in bad:
        assert field_of(spec(**{name: value})) == path


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"display_name": "x" * 4097}, "model.display_name"),
        ({"description": "a\x00"}, "model.description"),
        ({"labels": {"": "x"}}, "model.labels"),
        ({"labels": {"k": "x" * 257}}, "model.labels"),
        ({"labels": {f"k{i}": "" for i in range(65)}}, "model.labels"),
        ({"base_model": "../x"}, "model.base_model"),
        ({"source": replace(SOURCE, allow_patterns=("x",) * 65)}, "model.source.allow_patterns"),
        ({"source": replace(SOURCE, ignore_patterns=("\x00",))}, "model.source.ignore_patterns"),
        ({"source": replace(SOURCE, revision="r" * 257)}, "model.source.revision"),
    ],
)
def test_other_fields_are_bounded(change: dict[str, object], field: str) -> None:
    """Texts, labels and patterns are bounded in number and length, and have no NUL."""
    assert field_of(replace(spec(), **change)) == field  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"a": math.nan},
        {"a": [math.inf]},
        {"a": {"b": {"c": {"d": {"e": 1}}}}},
        {f"k{i}": 1 for i in range(65)},
        {"a": list(range(65))},
        {"a": "x" * 4097},
        {"x" * 257: 1},
        {"a\x00": 1},
    ],
    ids=str,
)
def test_backend_options_are_bounded_json(options: dict[str, object]) -> None:
    """Options that are too deep, too many, too long or no JSON are refused, naming the field."""
    assert field_of(spec(backend_options=options)).startswith("model.config.backend_options")


def test_backend_options_of_every_kind() -> None:
    """Texts, numbers, truths, nothing, lists and objects up to four deep are options."""
    rules.check_spec(spec(backend_options={"a": [1, 2.5, True, None, "x", {"b": {"c": "d"}}]}))


def test_a_model_is_created_once() -> None:
    """An id in use, by a model or by a slot, is ALREADY_EXISTS with the way out."""
    state = State()
    model = rules.create(state, "a", "uid", spec(), 5.0, DEVICES)
    assert (model.create_time, model.state, model.edit) == (5.0, ArtifactState.ABSENT, 1)
    state.apply(rules.model_edit(model, "CREATED"))
    state.apply(Edit(Kind.SLOT, "role", Slot("role", "a", 1.0)))
    for key in ("a", "role"):
        with pytest.raises(ModelhostError) as caught:
            rules.create(state, key, "uid", spec(), 5.0, DEVICES)
        assert caught.value.reason is Reason.ALREADY_EXISTS
        assert "--name" in caught.value.message


def test_models_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are at most so many models."""
    monkeypatch.setattr(rules, "MODELS_MAX", 1)
    state = State()
    state.apply(rules.model_edit(made(), "CREATED"))
    with pytest.raises(ModelhostError) as caught:
        rules.create(state, "b", "uid", spec(), 5.0, DEVICES)
    assert caught.value.metadata["field"] == "model_id"


def test_a_config_names_a_device_of_this_machine() -> None:
    """A device that is not here is refused, naming those that are, at create and at update."""
    for call in (
        lambda: rules.create(State(), "a", "uid", spec(device="cuda-7"), 5.0, DEVICES),
        lambda: rules.update(made(), spec(device="cuda-7"), "", 2.0, DEVICES),
    ):
        with pytest.raises(ModelhostError) as caught:
            call()
        assert "cpu, sim-0" in caught.value.message


def test_an_update_counts_and_checks_the_etag() -> None:
    """A change raises the edit and the etag; no change is none; a stale etag is ETAG_MISMATCH."""
    model = made()
    assert rules.update(model, rules.spec_of(model), "", 9.0, DEVICES) is model
    named = replace(rules.spec_of(model), display_name="x")
    changed = rules.update(model, named, model.etag, 9.0, DEVICES)
    assert (changed.edit, changed.update_time, changed.display_name) == (2, 9.0, "x")
    assert changed.etag != model.etag
    with pytest.raises(ModelhostError) as caught:
        rules.update(changed, named, model.etag, 9.0, DEVICES)
    assert caught.value.reason is Reason.ETAG_MISMATCH
    assert caught.value.metadata["actual"] == changed.etag


def test_which_config_needs_a_reload() -> None:
    """Live fields never need a reload, every other one does."""
    values = {"autoload": True, "priority": 5, "queue_limit": 5, "load_on_demand": False}
    others = {"keep_alive_s": 5.0, "load_timeout_s": 5.0, "backend": "x", "device": "cpu"}
    more = {"precision": "fp16", "max_batch_size": 4, "max_sequence_length": 4}
    rest = {"isolation": "PROCESS", "backend_options": {"a": 1}}
    rest |= {"max_batch_delay_s": 0.01, "dynamic_batching": False}
    rest |= {"host_keep_alive_s": 5.0, "fallback_model": "other"}
    every = {**values, **others, **more, **rest}
    assert set(every) == set(rules.CONFIG_FIELDS)
    for name, value in every.items():
        changed = replace(ModelConfig(), **{name: value})
        assert rules.needs_reload(ModelConfig(), changed) == (name not in LIVE_CONFIG_FIELDS)


# --- artifacts ----------------------------------------------------------------------------------


def arrive(model: Model, ending: str) -> tuple[Model, int]:
    """Give the model an artifact that ends in one way; returns its version too."""
    model, artifact = rules.wanted_artifact(model, "o", 1.0)
    version = artifact.version
    model = rules.with_artifact(model, version, ArtifactState.DOWNLOADING)
    model = rules.with_artifact(model, version, ArtifactState.VERIFYING)
    model = rules.with_artifact(model, version, ArtifactState(ending), operation="")
    return model, version


@given(st.lists(st.sampled_from(["AVAILABLE", "FAILED", "QUARANTINED"]), max_size=12))
def test_versions_rise_and_are_never_given_twice(endings: list[str]) -> None:
    """A new revision has the next version, a retry the one that failed; two good ones are kept."""
    model = made()
    good: list[int] = []
    for ending in endings:
        before = model.last_version
        retry = bool(model.artifacts) and model.artifacts[-1].state is not ArtifactState.AVAILABLE
        model, version = arrive(model, ending)
        assert version == (before if retry else before + 1)
        model, gone = rules.superseded(model, in_use=())
        if ending == "AVAILABLE":
            good.append(version)
        assert set(gone).isdisjoint(a.version for a in model.artifacts)
        kept = [a.version for a in model.artifacts if a.state is ArtifactState.AVAILABLE]
        assert kept == good[-rules.KEPT_ARTIFACTS :]
        assert (model.newest.version if model.newest else 0) == (good[-1] if good else 0)
        assert model.last_version == max(a.version for a in model.artifacts)


def test_what_is_in_use_is_kept() -> None:
    """A version that an instance uses outlives the two newest, until it is not used."""
    model = made()
    for _ in range(4):
        model, _ = arrive(model, "AVAILABLE")
    kept, gone = rules.superseded(model, in_use=(1,))
    assert ([a.version for a in kept.artifacts], gone) == ([1, 3, 4], [2])
    kept, gone = rules.superseded(kept, in_use=())
    assert ([a.version for a in kept.artifacts], gone) == ([3, 4], [1])


def test_a_chosen_version_is_what_loads_take() -> None:
    """A rollback chooses a version while it is there; 0 and the newest one choose the newest."""
    model = made()
    with pytest.raises(ModelhostError) as caught:
        rules.choose_version(model, 0)
    assert caught.value.reason is Reason.MODEL_NOT_DOWNLOADED
    for _ in range(2):
        model, _ = arrive(model, "AVAILABLE")
    back = rules.choose_version(model, 1)
    assert back.available is not None
    assert (back.available.version, back.newest and back.newest.version) == (1, 2)
    assert rules.artifact_at(back, 0).version == 1
    newer, _ = arrive(back, "AVAILABLE")
    assert newer.available is not None
    assert newer.available.version == 1
    for version in (0, 3):
        assert rules.choose_version(newer, version).chosen_version == 0
    gone = replace(newer, artifacts=newer.artifacts[1:])
    assert gone.available is gone.newest
    with pytest.raises(ModelhostError) as caught:
        rules.choose_version(gone, 1)
    assert "it has 2, 3" in caught.value.message


def test_a_models_state_is_that_of_its_best_artifact() -> None:
    """A model with a good artifact is AVAILABLE, whatever became of the newest one."""
    model, _ = arrive(made(), "AVAILABLE")
    failed, _ = arrive(model, "FAILED")
    assert failed.state is ArtifactState.AVAILABLE
    only, _ = arrive(made(), "FAILED")
    assert only.state is ArtifactState.FAILED
