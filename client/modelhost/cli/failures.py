"""Errors for people and scripts: three lines on stderr, an object with --json, and an exit code."""

import re
from collections.abc import Mapping

from modelhost import _errors
from modelhost._errors import ModelhostError
from modelhost.cli.output import Output, error_note

FAILURE = 1
INTERRUPTED = 130

EXIT_CODES: Mapping[type[ModelhostError], int] = {
    _errors.InvalidArgument: 2,
    _errors.NotFound: 3,
    _errors.Unreachable: 4,
    _errors.PreconditionFailed: 5,
    _errors.Conflict: 5,
    _errors.AlreadyExists: 5,
    _errors.OutOfMemory: 6,
    _errors.Timeout: 7,
}
"""Every other error is 1; 0 is success, 2 also click's own for a wrong command line, 130 Ctrl-C."""


def exit_code(error: ModelhostError) -> int:
    """Return the exit code of an error. SHUTTING_DOWN is like a daemon that is not there."""
    if error.reason == "SHUTTING_DOWN":
        return EXIT_CODES[_errors.Unreachable]
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), FAILURE)


def report(error: ModelhostError, output: Output) -> int:
    """Write what failed, why, and what to type next; return the exit code."""
    code = exit_code(error)
    lines = [f"modelhost: {error.message}" + (f" [{error.reason}]" if error.reason else "")]
    if error.hint and not _says(error.message, error.hint):
        lines.append(f"  next: {error.hint}")
    if error.retry_delay is not None:
        lines.append(f"  it may work in {error.retry_delay:g} s")
    if error.request_id:
        lines.append(f"  request: {error.request_id}")
    error_note(lines)
    if output.json:
        output.json_line({"error": as_object(error, code)})
    return code


def as_object(error: ModelhostError, code: int) -> dict[str, object]:
    """Return an error as JSON, the exit code included."""
    return {
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "hint": error.hint,
        "retryDelay": error.retry_delay,
        "requestId": error.request_id,
        "exitCode": code,
    }


def _says(message: str, hint: str) -> bool:
    """Whether a message names the command of a hint already."""
    commands = re.findall(r"`(modelhost \w+)", hint)
    return bool(commands) and all(command in message for command in commands)
