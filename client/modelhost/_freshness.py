"""How a model's files compare with what its source has now."""

import enum
from dataclasses import dataclass

from modelhost._errors import ModelhostError
from modelhost.v1 import models_pb2


class Freshness(enum.Enum):
    """What asking the source came to."""

    CURRENT = "current"
    """The newest revision is on disk."""
    OUTDATED = "outdated"
    """The source has another one."""
    ABSENT = "absent"
    """No revision is on disk."""
    NO_SOURCE = "no source"
    """Its files were uploaded."""
    UNKNOWN = "unknown"
    """The source could not be asked; ``error`` says why."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One model beside its source."""

    model: str
    """``models/{model}``."""
    freshness: Freshness
    revision: str = ""
    """What is on disk; empty = nothing."""
    newest: str = ""
    """What the source has; empty = not known."""
    error: ModelhostError | None = None


def on_disk(model: models_pb2.Model) -> str:
    """Return the revision of the newest artifact that is AVAILABLE; empty = none is."""
    available = models_pb2.Artifact.AVAILABLE
    found = [artifact for artifact in model.artifacts if artifact.state == available]
    return found[-1].revision if found else ""


def compared(model: models_pb2.Model, newest: str, error: ModelhostError | None = None) -> Compared:
    """Compare a model that has a source with the revision that the source has."""
    have = on_disk(model)
    if error is not None:
        return Compared(model.name, Freshness.UNKNOWN, have, "", error)
    if not have:
        return Compared(model.name, Freshness.ABSENT, "", newest)
    same = have == newest
    return Compared(model.name, Freshness.CURRENT if same else Freshness.OUTDATED, have, newest)
