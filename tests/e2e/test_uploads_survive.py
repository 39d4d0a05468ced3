"""An upload through a whole daemon that is killed in the middle of it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from modelhost import Client, ModelhostError
from modelhost.v1 import models_pb2, operations_pb2
from tests.adapters.downloads_support import safetensors
from tests.e2e.process import Daemon
from tests.support import wait_until

WEIGHTS = safetensors(24 << 20)
KEPT = 8 << 20


def test_an_upload_goes_on_after_a_kill(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """What was written is not sent again, nothing half is visible, and the end is bit-equal."""
    local = tmp_path / "model.safetensors"
    local.write_bytes(WEIGHTS)
    daemon = make_daemon()
    part = daemon.home / "staging" / "parts" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.part"
    with daemon, Client(daemon.target, retries=False) as client:

        def kill(operation: operations_pb2.Operation) -> None:
            # The last bytes are on their way, commit is not: it comes behind this.
            progress = operation.progress
            if not progress.phase and progress.done_bytes == progress.total_bytes:
                wait_until(lambda: part.exists() and part.stat().st_size >= KEPT)
                daemon.kill()

        with pytest.raises(ModelhostError):
            client.upload("mine", [local], progress=kill)
    assert list(daemon.home.glob("staging/parts/*.part")) == [part]
    assert not list(daemon.home.glob("models/*/*"))
    with daemon, Client(daemon.target) as client:
        (operation,) = client.operations()
        assert operation.error.reason == "DAEMON_RESTARTED"
        assert client.get("mine").state == models_pb2.Artifact.FAILED
        done = client.upload("mine", [local])
        (again,) = [o for o in client.operations() if o.state == operations_pb2.Operation.SUCCEEDED]
        assert again.download_result.reused_bytes >= KEPT
        path = daemon.home / "models" / "mine" / str(done.version) / "files" / local.name
        assert path.read_bytes() == WEIGHTS
    with daemon, Client(daemon.admin) as operator:
        found = operator.check_storage(deep=True).operation.check_storage_result
        assert list(found.findings) == []
