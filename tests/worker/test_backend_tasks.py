"""What the daemon says of backends without importing them is what they say of themselves."""

from modelhostd.core.tasks import BACKEND_PACKAGES, BACKEND_TASKS
from modelhostd.worker import registry
from modelhostd.worker.backends.transformers import TransformersBackend


def test_the_daemon_knows_the_tasks_of_its_own_backends() -> None:
    """BACKEND_TASKS has exactly the tasks that the transformers backend serves."""
    assert BACKEND_TASKS["transformers"] == TransformersBackend.tasks


def test_the_daemon_knows_the_packages_of_its_own_backends() -> None:
    """BACKEND_PACKAGES has what each of them asks for."""
    for name, packages in BACKEND_PACKAGES.items():
        assert registry._resolve(name, "").packages == packages, name
