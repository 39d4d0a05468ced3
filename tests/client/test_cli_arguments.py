"""Odd words on the command line: whatever stands there, what comes is a line for people and an exit code."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from modelhost.cli.app import SECTIONS
from tests.client.double import Double

ODD = ["", "\udcff", "\x1b[31m", "-1", "9" * 5000, str(2**63), "nan", "inf", "1e999", "a=\udcff", "=", "a=1e400", "{}", "x" * 5000]  # fmt: skip
LEFT_OUT = {"serve", "completion", "top", "lease"}
"""These run something else, or have a terminal."""


def commands() -> Iterator[tuple[str, ...]]:
    """Yield the words of every command."""
    for listed in SECTIONS.values():
        for command in listed:
            if isinstance(command, click.Group):
                yield from ((str(command.name), name) for name in command.commands)
            elif command.name not in LEFT_OUT:
                yield (str(command.name),)


def lines(words: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield command lines: one option or argument of each is odd."""
    command: click.Command = next(c for cs in SECTIONS.values() for c in cs if c.name == words[0])
    if isinstance(command, click.Group):
        command = command.commands[words[1]]
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    plain = [__file__ if p.name in ("paths", "file") else "a" for p in arguments if p.required]
    for odd in ODD:
        for option in command.params:
            if isinstance(option, click.Option) and not option.is_flag:
                yield [*words, *plain, option.opts[0], odd]
        for place in range(len(arguments)):
            yield [*words, *plain[:place], "--", odd, *plain[place + 1 :]]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_no_traceback_comes_of_an_odd_word(
    told: Double, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words
) -> None:
    """Each option and argument of each command with each odd value ends by an exit code."""
    monkeypatch.chdir(tmp_path)  # ``export`` writes what it is given.
    for line in lines(words):
        done = run(*line)
        if not isinstance(done.exception, SystemExit | None):
            pytest.fail(f"{ascii(line)[:300]}: {done.exception!r}")
