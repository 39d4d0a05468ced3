"""Whether a model can work on a device: one check after the other, each with its numbers.

Nothing is asked here; what is not known makes a check UNKNOWN, never PASSED.
"""

import enum
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field

from modelhostd.core.resources import Device, DeviceKind, Model
from modelhostd.core.tasks import ONLY_NAMED
from modelhostd.core.values import dataclass


class Outcome(enum.StrEnum):
    """How one check ended."""

    PASSED = "PASSED"
    FAILED = "FAILED"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what is needed, what is there (bytes as decimal numbers), and both in a sentence."""

    id: str
    outcome: Outcome
    needed: str
    available: str
    message: str


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the checks compare with.

    ``capacity_bytes`` are the bytes modelhost may use of each device, by id. ``packages`` has the
    version of each package that the model names, empty where it is not installed; one that is absent is
    not known. ``backends`` maps
    those that can be used to their tasks; None = not known.
    """

    capacity_bytes: Mapping[str, int]
    free_disk_bytes: int | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    backends: Mapping[str, Collection[str]] | None = None


_PREFERENCE = {DeviceKind.CUDA: 0, DeviceKind.SIM: 1, DeviceKind.CPU: 2}
_REQUIREMENT = re.compile(
    r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*([<>=!~]=?[^;]*)?(;.*)?"
)
_CLAUSE = re.compile(r"(>=|<=|==|!=|>|<)\s*([0-9]+(?:\.[0-9]+)*)")


def needed_bytes(model: Model) -> int:
    """Return the device memory a model is known or said to need; 0 = not known."""
    artifact = model.available
    if artifact is not None:
        return artifact.predicted_bytes or artifact.size_bytes
    return model.requirements.device_bytes


def best_device(model: Model, devices: Sequence[Device], around: Surroundings) -> Device:
    """Return the device to check for: the model's own, else where it fits; GPUs before the CPU."""
    own = next((d for d in devices if d.id == model.config.device), None)
    if own is not None:
        return own
    needed = needed_bytes(model)

    def rank(device: Device) -> tuple[bool, int, int, str]:
        capacity = around.capacity_bytes.get(device.id, 0)
        return capacity < needed, _PREFERENCE[device.kind], -capacity, device.id

    return min(devices, key=rank)


def check(model: Model, device: Device, around: Surroundings) -> Sequence[Check]:
    """Return every check of a model against a device."""
    return [
        _memory(model, device, around.capacity_bytes.get(device.id, 0)),
        _disk(model, around.free_disk_bytes),
        _packages(model.requirements.packages, around.packages),
        _capability(model.requirements.compute_capability, device),
        _backend(model, around.backends),
        _task(model, around.backends),
    ]


def package_name(requirement: str) -> str:
    """Return the package that a PEP 508 requirement names: ``sentencepiece>=0.2`` -> its name."""
    found = _REQUIREMENT.fullmatch(requirement)
    return found.group(1) if found is not None else ""


def _memory(model: Model, device: Device, capacity: int) -> Check:
    needed = needed_bytes(model)
    where = f"devices/{device.id}"
    if not needed:
        return Check(
            "device_memory",
            Outcome.UNKNOWN,
            "",
            str(capacity),
            f"what the model needs is known once it is downloaded; {where} has {capacity} bytes",
        )
    if needed <= capacity:
        message = f"the model needs {needed} of the {capacity} bytes of {where}"
        return Check("device_memory", Outcome.PASSED, str(needed), str(capacity), message)
    message = (
        f"the model needs {needed} bytes, {where} has a budget of {capacity}; raise the budget "
        f"(UpdateDevice) or take a smaller precision"
    )
    return Check("device_memory", Outcome.FAILED, str(needed), str(capacity), message)


def _disk(model: Model, free: int | None) -> Check:
    if model.available is not None:
        return Check("disk_space", Outcome.PASSED, "0", _number(free), "the files are on disk")
    needed = model.artifacts[-1].size_bytes if model.artifacts else 0
    if not needed or free is None:
        message = "the size of the files is not known yet; InspectSource asks the source"
        return Check("disk_space", Outcome.UNKNOWN, "", _number(free), message)
    if needed <= free:
        message = f"the files take {needed} of {free} free bytes"
        return Check("disk_space", Outcome.PASSED, str(needed), str(free), message)
    message = f"the files take {needed} bytes, {free} are free on disk; free {needed - free} more"
    return Check("disk_space", Outcome.FAILED, str(needed), str(free), message)


def _packages(wanted: Sequence[str], installed: Mapping[str, str]) -> Check:
    needed = ", ".join(wanted)
    have = ", ".join(f"{n} {v}" for n, v in installed.items() if v)
    if not wanted:
        return Check("packages", Outcome.PASSED, "", have, "the model asks for no package")
    missing, unclear = [], []
    for requirement in wanted:
        name = package_name(requirement)
        version = installed.get(name)
        if not name or version is None:
            unclear.append(requirement)
        elif not version:
            missing.append(requirement)
        else:
            fits = _fits(requirement, version)
            if fits is None:
                unclear.append(requirement)
            elif not fits:
                missing.append(f"{requirement} (installed: {version})")
    if missing:
        message = f"missing: {', '.join(missing)}; install them beside the daemon (pip install)"
        return Check("packages", Outcome.FAILED, needed, have, message)
    if unclear:
        message = f"cannot tell whether {', '.join(unclear)} is fulfilled"
        return Check("packages", Outcome.UNKNOWN, needed, have, message)
    return Check("packages", Outcome.PASSED, needed, have, "all packages are installed")


def _capability(wanted: str, device: Device) -> Check:
    have = device.compute_capability
    if not wanted:
        message = "the model asks for no compute capability"
        return Check("compute_capability", Outcome.PASSED, "", have, message)
    if have and _release(have) >= _release(wanted):
        message = f"devices/{device.id} has compute capability {have}, the model needs {wanted}"
        return Check("compute_capability", Outcome.PASSED, wanted, have, message)
    message = (
        f"the model needs compute capability {wanted}, devices/{device.id} has {have or 'none'}; "
        f"choose another device"
    )
    return Check("compute_capability", Outcome.FAILED, wanted, have, message)


def _backend(model: Model, backends: Mapping[str, Collection[str]] | None) -> Check:
    wanted = model.config.backend
    have = ", ".join(sorted(backends or ()))
    if backends is None:
        return Check("backend", Outcome.UNKNOWN, wanted, "", "the backends are not known yet")
    if not wanted:
        outcome = Outcome.PASSED if backends else Outcome.FAILED
        message = "the host chooses the backend" if backends else "no backend can be used"
        return Check("backend", outcome, "", have, message)
    if wanted in backends:
        return Check("backend", Outcome.PASSED, wanted, have, f"backend {wanted} can be used")
    message = f"backend {wanted} cannot be used; those that can: {have or 'none'}"
    return Check("backend", Outcome.FAILED, wanted, have, message)


def _task(model: Model, backends: Mapping[str, Collection[str]] | None) -> Check:
    if not model.task or backends is None:
        message = "the task is known once the model is downloaded"
        return Check("task", Outcome.UNKNOWN, model.task, "", message)
    wanted = model.config.backend
    asked = {name: tasks for name, tasks in backends.items() if name not in ONLY_NAMED}
    if wanted:
        asked = {wanted: backends.get(wanted, ())}
    served = sorted({task for tasks in asked.values() for task in tasks})
    if model.task in served or (wanted and "*" in served):
        message = f"task {model.task} is served"
        return Check("task", Outcome.PASSED, model.task, ", ".join(served), message)
    if "*" in served:
        message = f"whether a backend here serves task {model.task} is known when it loads"
        return Check("task", Outcome.UNKNOWN, model.task, ", ".join(served), message)
    message = f"no backend here serves task {model.task}; served: {', '.join(served) or 'none'}"
    return Check("task", Outcome.FAILED, model.task, ", ".join(served), message)


def _fits(requirement: str, version: str) -> bool | None:
    """Whether a version fulfils a requirement; None where that takes more than comparing numbers."""
    found = _REQUIREMENT.fullmatch(requirement)
    clauses = (found.group(3) or "").strip() if found is not None else ""
    if not clauses:
        return True
    have = _release(version)
    for clause in clauses.split(","):
        part = _CLAUSE.fullmatch(clause.strip())
        if part is None:
            return None
        than = _release(part.group(2))
        length = max(len(have), len(than))
        left = have + (0,) * (length - len(have))
        right = than + (0,) * (length - len(than))
        holds = {
            ">=": left >= right,
            "<=": left <= right,
            "==": left == right,
            "!=": left != right,
            ">": left > right,
            "<": left < right,
        }[part.group(1)]
        if not holds:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found is not None else ()


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
