"""What the arguments of the client's methods may be: their annotations say it, and it is checked before anything is sent.

protobuf and grpc would raise plain errors of Python for them, without a name.
"""

import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from modelhost._errors import invalid

C = TypeVar("C", bound=type)
Check = Callable[[str, Any], Any]
"""Of an argument's name and its value, to the value as it goes on. Raises InvalidArgument."""

SECONDS_MAX = 1e9
"""Of any span, in either direction: 31 years, which grpc and protobuf both hold."""

_SHOWN_MAX = 100
_INT32, _INT64 = (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)
_RANGES: Mapping[str, tuple[int, int]] = {
    "since": (0, 2**63 - 2),  # What is asked for is the one after it.
    "limit": (0, 2**63 - 1),
    "budget_bytes": _INT64,
    "rate_limit_bytes_per_second": _INT64,
    "max_message_bytes": _INT64,
}
"""Of whole numbers by name; others have 32 bits in the contract."""


def checked(kind: C) -> C:
    """Have the public methods of a class, and the making of it, refuse arguments that their annotations exclude."""
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name == "__init__" or not name.startswith("_"):
            setattr(kind, name, _checked(method))
    return kind


def text(name: str, value: Any) -> str:
    """Return a text that can be sent. Raises InvalidArgument for another type, and for half characters."""
    if not isinstance(value, str):
        raise invalid(name, "a string", shown(value))
    # Of an Enum of texts its value: within a name it would be written as the member's.
    plain = str.__str__(value)
    try:
        plain.encode()
    except UnicodeEncodeError:
        raise invalid(name, "a string that UTF-8 can hold", shown(value)) from None
    return plain


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Return several texts. Raises InvalidArgument also for one text, which is one of letters to Python."""
    return tuple(text(f"{name}[{n}]", one) for n, one in enumerate(_several(name, value)))


def shown(value: Any) -> str:
    """Return a value for a message, whatever it is; numbers of any length are cut."""
    try:
        shown = ascii(value)
    except Exception:
        # Python has a limit for the digits of an int, and anyone may write a __repr__.
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= _SHOWN_MAX else shown[: _SHOWN_MAX - 3] + "..."


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(method).parameters
    names = tuple(parameters)
    checks = {n: c for n, p in parameters.items() if (c := _check_of(p.annotation)) is not None}
    if not checks:
        return method

    def looked_at(
        given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        placed = tuple(
            checks[name](name, value) if name in checks else value
            for name, value in zip(names, given, strict=False)
        )
        # What is too many is for Python to refuse.
        return placed + given[len(names) :], {
            name: checks[name](name, value) if name in checks else value
            for name, value in named.items()
        }

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def wait(*given: Any, **named: Any) -> Any:
            given, named = looked_at(given, named)
            return await method(*given, **named)

        return wait

    @functools.wraps(method)
    def call(*given: Any, **named: Any) -> Any:
        given, named = looked_at(given, named)
        return method(*given, **named)

    return call


def _check_of(annotation: Any) -> Check | None:
    """Return what checks a parameter; None where its annotation says nothing that is checked here."""
    if get_origin(annotation) is UnionType:
        others = [one for one in get_args(annotation) if one is not NoneType]
        check = _check_of(others[0]) if len(others) == 1 else None
        return _or_none(check) if check is not None else None
    if get_origin(annotation) in (Iterable, Sequence):
        return {str: texts, str | os.PathLike[str]: _paths}.get(get_args(annotation)[0])
    if get_origin(annotation) is Mapping:
        return functools.partial(_mapping, get_args(annotation)[1] is str)
    return {str: text, bool: _flag, int: _whole, float: _seconds, bytes: _bytes}.get(annotation)


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _flag(name: str, value: Any) -> bool:
    # numpy's own is no bool.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise invalid(name, "True or False", shown(value))
    return bool(value)


def _whole(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise invalid(name, "a whole number", shown(value)) from None
    low, high = _RANGES.get(name, _INT32)
    if not low <= number <= high:
        raise invalid(name, f"{low} to {high}", shown(number))
    return number


def _seconds(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not -SECONDS_MAX <= number <= SECONDS_MAX:
        raise invalid(name, f"seconds, at most {SECONDS_MAX:.0f}", shown(value))
    return number


def _bytes(name: str, value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise invalid(name, "bytes", shown(value))
    return bytes(value)


def _mapping(of_texts: bool, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise invalid(name, "a dict", shown(value))
    return {
        text(name, key): text(f"{name}[{key}]", one) if of_texts else one
        for key, one in value.items()
    }


def _paths(name: str, value: Any) -> tuple[str | os.PathLike[str], ...]:
    found = _several(name, value)
    for number, path in enumerate(found):
        try:
            fits = isinstance(os.fspath(path), str) and b"\0" not in os.fsencode(path)
        except (TypeError, UnicodeEncodeError):
            fits = False
        if not fits:
            raise invalid(f"{name}[{number}]", "a path", shown(path))
    return found


def _several(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | os.PathLike):
        raise invalid(name, "a list of strings", "one string; put it in a list")
    try:
        return tuple(value)
    except TypeError:
        raise invalid(name, "a list of strings", shown(value)) from None
