"""Resources as JSON text and back, typed by their kind.

Unknown fields are ignored and missing ones take their defaults, so that rows of an older version load.
A new value of an enum is another matter: an older daemon cannot read it, so it needs a new schema
version (``adapters/schema.py``).
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from modelhostd.core.resources import (
    Device,
    Instance,
    Kind,
    Lease,
    Model,
    Operation,
    Resource,
    Settings,
    Slot,
)

RESOURCE_TYPES: Mapping[Kind, type[Resource]] = {
    Kind.MODEL: Model,
    Kind.INSTANCE: Instance,
    Kind.OPERATION: Operation,
    Kind.DEVICE: Device,
    Kind.SLOT: Slot,
    Kind.LEASE: Lease,
    Kind.SETTINGS: Settings,
}


class CodecError(Exception):
    """A value that cannot be stored, or a stored text that is not the value it should be."""


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be stored")


_encoder = msgspec.json.Encoder(enc_hook=_plain)
_decoders = {kind: msgspec.json.Decoder(type_) for kind, type_ in RESOURCE_TYPES.items()}
_details_decoder = msgspec.json.Decoder(dict[str, str])


def _encode(value: object, decoder: msgspec.json.Decoder[Any]) -> str:
    try:
        encoded = _encoder.encode(value)
        # msgspec encodes what a field's type forbids (NaN as null, an int where a str belongs).
        # Found here it fails one command; found when the daemon starts it would cost the registry.
        decoder.decode(encoded)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CodecError(f"{type(value).__name__}: {error}") from error
    return encoded.decode()


def _decode(text: str | bytes, decoder: msgspec.json.Decoder[Any], what: str) -> Any:
    try:
        return decoder.decode(text)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise CodecError(f"{what}: {error}") from error


def encode_resource(kind: Kind, resource: Resource) -> str:
    """Return ``resource`` as JSON. Raises CodecError for what could not be read back."""
    if not isinstance(resource, RESOURCE_TYPES[kind]):
        raise CodecError(f"a {type(resource).__name__} is not one of {kind.value}")
    return _encode(resource, _decoders[kind])


def decode_resource(kind: Kind, text: str | bytes) -> Resource:
    """Return the resource of ``kind`` in ``text``. Raises CodecError."""
    resource: Resource = _decode(text, _decoders[kind], kind.value)
    return resource


def encode_details(details: Mapping[str, str]) -> str:
    """Return an event's details as JSON. Raises CodecError for values that are not text."""
    return _encode(dict(details), _details_decoder)


def decode_details(text: str | bytes) -> dict[str, str]:
    """Return the details in ``text``. Raises CodecError."""
    details: dict[str, str] = _decode(text, _details_decoder, "details")
    return details
