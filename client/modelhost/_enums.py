"""Names of the contract's enum values, also of those that a newer daemon has and this client has not."""

from typing import Any

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from modelhost._errors import invalid


def name_of(enum: "EnumTypeWrapper | type[Any]", number: int) -> str:
    """Return a value's name; ``UNSPECIFIED`` for 0, the number itself where it is not known."""
    assert isinstance(enum, EnumTypeWrapper)
    if number == 0:
        return "UNSPECIFIED"
    value = enum.DESCRIPTOR.values_by_number.get(number)
    return value.name if value is not None else str(number)


def names(enum: "EnumTypeWrapper | type[Any]") -> list[str]:
    """Return the names that can be asked for."""
    assert isinstance(enum, EnumTypeWrapper)
    return [value.name for value in enum.DESCRIPTOR.values if value.number]


def number_of(enum: "EnumTypeWrapper | type[Any]", text: str, field: str) -> Any:
    """Return the value of a name in upper or lower case. Raises InvalidArgument naming ``field``."""
    name = text.upper().replace("-", "_")
    known = names(enum)
    if name not in known:
        raise invalid(field, f"one of {', '.join(known)}", repr(text))
    assert isinstance(enum, EnumTypeWrapper)
    return enum.DESCRIPTOR.values_by_name[name].number
