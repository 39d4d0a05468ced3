"""Finds the backends that the operator allows: by name, by entry point, or by an explicit target."""

import importlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterable, Mapping

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass
from modelhostd.worker.backend import Backend

log = logging.getLogger("modelhostd.worker")

ENTRY_POINT_GROUP = "modelhost.backends"
OWN = {
    "torch-export": "modelhostd.worker.backends.modules.exported:TorchExportBackend",
    "torch-module": "modelhostd.worker.backends.modules.installed:InstalledModuleBackend",
    "text-generation": "modelhostd.worker.backends.generation.backend:TextGenerationBackend",
    "identity": "modelhostd.worker.backends.identity:IdentityBackend",
    "transformers": "modelhostd.worker.backends.transformers:TransformersBackend",
}
"""Found without entry points too, so that a source tree that is not installed works."""


@dataclass(frozen=True, slots=True)
class Registry:
    """The backends of this worker: those that can serve, and why the others cannot."""

    backends: Mapping[str, type[Backend]]
    unavailable: Mapping[str, str]
    libraries: Mapping[str, str]

    def choose(self, model: str, name: str, task: str) -> tuple[str, type[Backend]]:
        """Return the backend called ``name``, or where that is empty the first that serves ``task``.

        Raises BACKEND_NOT_AVAILABLE or UNSUPPORTED_MODEL.
        """
        available = ", ".join(self.backends) or "none"
        if name:
            if name in self.backends:
                return name, self.backends[name]
            missing = self.unavailable.get(name, "it is not among the allowed backends")
            raise ModelhostError(
                Reason.BACKEND_NOT_AVAILABLE,
                f"Backend '{name}' of model '{model}' is not available: {missing}. Available: "
                f"{available}.",
                {"backend": name, "missing": missing, "available": available},
            )
        for candidate, backend in self.backends.items():
            if task in backend.tasks:
                return candidate, backend
        absent = "".join(f"; not {name} ({why})" for name, why in self.unavailable.items())
        raise ModelhostError(
            Reason.UNSUPPORTED_MODEL,
            f"No available backend serves task '{task}' of model '{model}'. Available: {available}"
            f"{absent}; set config.backend, or the task if it is wrong.",
            {"model": model, "task": task, "cause": "no backend serves the task"},
        )


def find(allowed: Iterable[tuple[str, str]]) -> Registry:
    """Import the allowed backends, given as (name, target), and what they need.

    A backend that cannot be imported does not keep the others from serving: it is listed with why.
    """
    backends: dict[str, type[Backend]] = {}
    unavailable: dict[str, str] = {}
    libraries: dict[str, str] = {}
    for name, target in allowed:
        try:
            backend = _resolve(name, target)
            missing = [package for package in backend.packages if not _installed(package)]
            if missing:
                unavailable[name] = f"missing packages: {', '.join(missing)}"
                continue
            libraries.update(backend.prepare())
            backends[name] = backend
        except Exception as error:
            log.exception("backend %s cannot be used", name)
            unavailable[name] = f"{error}"[:300] or "its import failed"
    return Registry(backends, unavailable, libraries)


def _resolve(name: str, target: str) -> type[Backend]:
    if not target:
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)
        target = next((point.value for point in points), OWN.get(name, ""))
    if not target:
        raise LookupError(f"no entry point '{name}' in group {ENTRY_POINT_GROUP}")
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise TypeError(f"{target} is not derived from modelhostd.worker.backend.Backend")
    return found


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
