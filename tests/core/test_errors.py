"""The page of errors: every reason has a code, and every error says what its reason promises."""

import contextlib

import pytest

from modelhostd.core.errors import REASONS, Code, ModelhostError, Reason, invalid


def test_every_reason_has_its_line() -> None:
    """The table names each reason once, with a code and with metadata keys in camel case."""
    assert set(REASONS) == set(Reason)
    for spec in REASONS.values():
        assert isinstance(spec.code, Code)
        assert len(set(spec.keys)) == len(spec.keys)
        assert all(key.isalnum() and key[0].islower() for key in spec.keys)


def test_what_a_retry_may_change_has_a_code_of_its_own() -> None:
    """QUEUE_FULL is never UNAVAILABLE, which some clients retry on their own; lost workers are."""
    assert REASONS[Reason.QUEUE_FULL].code is Code.RESOURCE_EXHAUSTED
    assert REASONS[Reason.WORKER_LOST].code is Code.UNAVAILABLE
    assert REASONS[Reason.SEQUENCE_COMPACTED].code is Code.OUT_OF_RANGE


def test_an_error_is_its_sentence() -> None:
    """The text of an error is its message, and its code is that of its reason."""
    error = ModelhostError(Reason.GATED, "accept the terms", {"source": "hf://a/b"}, 1.0)
    assert str(error) == "accept the terms"
    assert error.code is Code.FAILED_PRECONDITION
    assert error.args == ("accept the terms",)


def test_errors_are_told_apart_by_identity() -> None:
    """Two errors with the same words are two errors: each has a traceback of its own."""
    one, other = (ModelhostError(Reason.OFFLINE, "no") for _ in range(2))
    assert one != other
    assert len({one, other}) == 2


def test_an_error_may_pass_through_context_managers() -> None:
    """contextlib sets the traceback of what passes: an error must let it."""

    @contextlib.contextmanager
    def passing() -> object:
        yield

    with pytest.raises(ModelhostError), passing():
        raise ModelhostError(Reason.OFFLINE, "no")


def test_metadata_is_not_shared_by_default() -> None:
    """An error without metadata has an empty dictionary of its own."""
    one, other = (ModelhostError(Reason.OFFLINE, "no") for _ in range(2))
    one.metadata["source"] = "x"
    assert not other.metadata


def test_invalid_names_field_expectation_and_value() -> None:
    """A bad field is named with what was expected and what came, on one line and bounded."""
    error = invalid("model.config", "1 to 5", 7)
    assert error.reason is Reason.INVALID_ARGUMENT
    assert error.metadata == {"field": "model.config", "expected": "1 to 5", "actual": "7"}
    long = invalid("name", "an id", "x\n" * 1000)
    assert "\n" not in long.message
    assert len(long.metadata["actual"]) == 200
