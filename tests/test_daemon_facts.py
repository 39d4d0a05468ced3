"""What the daemon tells of itself without a worker."""

import pytest

from modelhostd import daemon


def test_a_backend_whose_packages_are_missing_is_not_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without torch the transformers backend says so; identity, which needs nothing, is there."""
    there = {"transformers": "5.0", "safetensors": "0.8", "jinja2": "3"}
    monkeypatch.setattr(daemon, "_installed", lambda package: there.get(package, ""))
    found = daemon._backend("transformers")
    assert (found.available, found.message) == (False, "missing packages: torch")
    assert daemon._backend("identity").available
    there["torch"] = "2.13"
    assert daemon._backend("transformers").available
