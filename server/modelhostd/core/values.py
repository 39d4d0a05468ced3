"""``dataclass`` that costs a start less: what the standard one compiles from text for each class, these share.

Used as ``dataclasses.dataclass``, which it is to a type checker, but for ``order``. Python 3.11 compiles six methods of a
frozen class whenever it is imported: 110 ms for the daemon's 181 classes, of the 0.35 s of its start. Here ``__repr__``,
``__eq__`` and ``__hash__`` read the fields by name and do the same; ``__init__``, and what refuses changes, stay the
standard ones. That is 9 % of a start's CPU time (bench/RESULTS.md).
"""

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(
        cls: type | None = None, /, *, frozen: bool = False, eq: bool = True, slots: bool = False
    ) -> type | Callable[[type], type]:
        """Make a class a dataclass, or return the decorator that does. A class may have its own of what is shared."""
        if cls is None:
            return lambda cls: dataclass(cls, frozen=frozen, eq=eq, slots=slots)
        made = dataclasses.dataclass(cls, frozen=frozen, eq=False, repr=False, slots=slots)
        methods = {"__repr__": _repr}
        if eq:
            methods |= _comparison(made, hashed=frozen)
        for name, method in methods.items():
            # Python itself takes the hash of a class that only says what is equal.
            if cls.__dict__.get(name) is None:
                setattr(made, name, method)
        return made


@recursive_repr()
def _repr(self: Any) -> str:
    shown = (field.name for field in dataclasses.fields(self) if field.repr)
    values = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
    return f"{type(self).__qualname__}({values})"


def _comparison(cls: Any, *, hashed: bool) -> dict[str, Any]:
    """Return what compares two of a class by the fields that say so, and their hash."""
    names = [field.name for field in dataclasses.fields(cls) if field.compare]
    values: Callable[[object], object] = attrgetter(*names) if names else lambda _: ()

    def equal(self: object, other: object) -> object:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return values(self) == values(other)

    return {"__eq__": equal, "__hash__": (lambda self: hash(values(self))) if hashed else None}
