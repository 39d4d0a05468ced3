"""Sizes on the command line."""

import pytest

from tests.client.double import Double

COMMANDS = (
    ["pull", "mini", "--rate"],
    ["ops", "update", "x", "--rate"],
    ["budget", "cpu"],
    ["rate"],
)


@pytest.mark.parametrize("size", ["99999999TB", "9" * 400, "-1", "1e30", "nan"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_size_that_is_none_is_an_error_of_the_command_line(
    told: Double, run, command, size
) -> None:
    """What no number of bytes holds is refused before any call, in words."""
    done = run(*command, size)
    assert done.exit_code == 2
    assert "size" in done.stderr or "No such option" in done.stderr
    assert told.calls == []


def test_a_device_has_no_budget_of_nothing(told: Double, run) -> None:
    """0 is no budget, and the error says what is: the default has a word of its own."""
    done = run("budget", "cpu", "0")
    assert done.exit_code == 2
    assert "default" in done.stderr
    assert told.calls == []
