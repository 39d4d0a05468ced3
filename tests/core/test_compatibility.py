"""Compatibility: every check with its three outcomes, and the numbers behind it."""

from dataclasses import replace

import pytest

from modelhostd.core import compatibility as rules
from modelhostd.core.compatibility import Outcome, Surroundings
from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Device,
    DeviceKind,
    Model,
    ModelConfig,
    Requirements,
    Source,
)

PASSED, FAILED, UNKNOWN = Outcome.PASSED, Outcome.FAILED, Outcome.UNKNOWN

MODEL = Model("m", "u", Source("hf://o/m"), 0.0, 0.0)
ON_DISK = Artifact(1, ArtifactState.AVAILABLE, size_bytes=90, predicted_bytes=100)
COMING = Artifact(1, ArtifactState.DOWNLOADING, size_bytes=90)
CUDA = Device("cuda-0", DeviceKind.CUDA, "", "", 1000, 500, compute_capability="8.9")
CPU = Device("cpu", DeviceKind.CPU, "", "", 1000, 800)


def needs(**requirements: object) -> Model:
    return replace(MODEL, requirements=Requirements(**requirements))  # type: ignore[arg-type]


def outcome(model: Model, check: str, device: Device = CUDA, **around: object) -> Outcome:
    given = Surroundings({"cuda-0": 500, "cpu": 800}, **around)  # type: ignore[arg-type]
    found = {c.id: c for c in rules.check(model, device, given)}
    assert all(c.message for c in found.values())
    return found[check].outcome


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (MODEL, UNKNOWN),
        (needs(device_bytes=500), PASSED),
        (needs(device_bytes=501), FAILED),
        (replace(needs(device_bytes=9999), artifacts=(ON_DISK,)), PASSED),
    ],
    ids=["unknown", "fits", "too large", "measured wins"],
)
def test_memory_is_compared_with_the_budget(model: Model, expected: Outcome) -> None:
    """What is known of the files takes precedence over what somebody said."""
    assert outcome(model, "device_memory") is expected


def test_disk_is_compared_with_what_is_still_to_come() -> None:
    """Files that are there need no space; a size or a free space that is not known is UNKNOWN."""
    coming = replace(MODEL, artifacts=(COMING,))
    assert outcome(replace(MODEL, artifacts=(ON_DISK,)), "disk_space") is PASSED
    assert outcome(MODEL, "disk_space", free_disk_bytes=1000) is UNKNOWN
    assert outcome(coming, "disk_space") is UNKNOWN
    assert outcome(coming, "disk_space", free_disk_bytes=90) is PASSED
    assert outcome(coming, "disk_space", free_disk_bytes=89) is FAILED


@pytest.mark.parametrize(
    ("requirement", "installed", "expected"),
    [
        ("a", {"a": "1"}, PASSED),
        ("a", {"a": ""}, FAILED),
        ("a", {}, UNKNOWN),
        ("a>=1.2", {"a": "1.10"}, PASSED),
        ("a>=1.2", {"a": "1.1.9"}, FAILED),
        ("a==1.0", {"a": "1"}, PASSED),
        ("a!=1", {"a": "1.0"}, FAILED),
        ("a>1,<2", {"a": "1.5rc1"}, PASSED),
        ("a[extra]>=1 ; python_version>'3'", {"a": "2"}, PASSED),
        ("a~=1.2", {"a": "1.3"}, UNKNOWN),
        ("???", {}, UNKNOWN),
    ],
)
def test_packages_are_compared_by_release(
    requirement: str, installed: dict[str, str], expected: Outcome
) -> None:
    """Numbers are compared as numbers; what takes more than that is UNKNOWN, never PASSED."""
    model = needs(packages=(requirement,))
    assert outcome(model, "packages", packages=installed) is expected


def test_compute_capability_is_compared_as_a_number() -> None:
    """8.9 is below 12.0, and a device without one has none."""
    assert outcome(MODEL, "compute_capability", CPU) is PASSED
    assert outcome(needs(compute_capability="8.0"), "compute_capability") is PASSED
    assert outcome(needs(compute_capability="12.0"), "compute_capability") is FAILED
    assert outcome(needs(compute_capability="8.0"), "compute_capability", CPU) is FAILED


def test_backend_and_task_are_those_that_can_be_used() -> None:
    """Unknown backends leave both UNKNOWN; a named one must be there and serve the task."""
    tasks = {"transformers": ("feature-extraction",), "identity": ("*",)}
    named = replace(MODEL, config=ModelConfig(backend="transformers"), task="text-to-image")
    assert outcome(MODEL, "backend") is UNKNOWN
    assert outcome(MODEL, "backend", backends=tasks) is PASSED
    assert outcome(MODEL, "backend", backends={}) is FAILED
    assert outcome(named, "backend", backends=tasks) is PASSED
    assert outcome(named, "backend", backends={"identity": ("*",)}) is FAILED
    assert outcome(MODEL, "task", backends=tasks) is UNKNOWN
    assert outcome(named, "task", backends=tasks) is FAILED
    unnamed = replace(named, config=ModelConfig())
    assert outcome(unnamed, "task", backends=tasks) is FAILED
    assert outcome(replace(unnamed, task="feature-extraction"), "task", backends=tasks) is PASSED


def test_a_backend_that_serves_what_names_it_serves_nobody_else() -> None:
    """With identity alone (torch is missing) a real task FAILED; of others' backends nothing is known."""
    model = replace(MODEL, task="feature-extraction")
    alone = {"identity": ("*",)}
    assert outcome(model, "task", backends=alone) is FAILED
    chosen = replace(model, config=ModelConfig(backend="identity"))
    assert outcome(chosen, "task", backends=alone) is PASSED
    assert outcome(model, "task", backends={**alone, "own": ("*",)}) is UNKNOWN


def test_the_best_device_is_the_models_own_or_where_it_fits() -> None:
    """Its own first; else one where it fits, a GPU before the CPU."""
    around = Surroundings({"cuda-0": 500, "cpu": 800})
    assert rules.best_device(MODEL, [CPU, CUDA], around).id == "cuda-0"
    assert rules.best_device(needs(device_bytes=600), [CPU, CUDA], around).id == "cpu"
    own = replace(MODEL, config=ModelConfig(device="cpu"))
    assert rules.best_device(own, [CPU, CUDA], around).id == "cpu"
