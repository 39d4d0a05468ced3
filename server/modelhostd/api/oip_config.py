"""The parameter ``config`` of RepositoryModelLoad: JSON, read as changes of a model's config.

Clients take what ModelConfig answers, change it and send all of it back. So two kinds of fields may stand in it:
those of ``modelhost.v1.ModelConfig``, which are set (null = back to the default), and those of Triton's
configuration, which have to be as they are: modelhost takes inputs, outputs and the like from the model itself.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from modelhost.oip import model_config_pb2
from modelhost.v1 import models_pb2
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.registry import BATCH_DELAY_S_MAX
from modelhostd.core.values import dataclass

FIELD = "parameters[config]"

_OURS = frozenset(field.name for field in models_pb2.ModelConfig.DESCRIPTOR.fields)
_THEIRS = frozenset(field.name for field in model_config_pb2.ModelConfig.DESCRIPTOR.fields)
_UPPER = re.compile(r"[A-Z]")
_BATCHING = "dynamic_batching"
_DELAY = "max_queue_delay_microseconds"
_INSIDE = "model.config."
"""How the rules of a model call what is a ``config`` here."""


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """``config`` holds what is to be set, ``names`` which fields of it; ``as_is`` what must be so already.

    ``sent`` has the key that each field came under: errors name that one.
    """

    config: models_pb2.ModelConfig
    names: Sequence[str]
    as_is: model_config_pb2.ModelConfig
    as_is_names: Sequence[str]
    sent: Mapping[str, str]

    def check(self, current: model_config_pb2.ModelConfig) -> None:
        """Raise INVALID_ARGUMENT for the first of Triton's fields that differs from what is loaded."""
        for name in self.as_is_names:
            given, have = getattr(self.as_is, name), getattr(current, name)
            if given != have:
                raise invalid(
                    f"{FIELD}.{self.sent[name]}",
                    f"{_shown(have)}, as ModelConfig answers it: modelhost takes it from the model",
                    _shown(given),
                )

    @contextmanager
    def named_as_sent(self) -> Iterator[None]:
        """Give an error about a field of a model's config the name that the client knows it by."""
        try:
            yield
        except ModelhostError as error:
            field = error.metadata.get("field", "")
            if error.reason is not Reason.INVALID_ARGUMENT or not field.startswith(_INSIDE):
                raise
            name, dot, below = field.removeprefix(_INSIDE).partition(".")
            shown = f"{FIELD}.{self.sent.get(name, name)}{dot}{below}"
            message = error.message.replace(field, shown, 1)
            metadata = {**error.metadata, "field": shown}
            raise ModelhostError(error.reason, message, metadata) from None


def read(text: str) -> ConfigChange:
    """Return what a ``config`` says. Raises INVALID_ARGUMENT naming the field that is wrong."""
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    sent: dict[str, str] = {}
    for key, value in _object(text).items():
        name = _contract_name(key)
        sent[name] = key
        if name == _BATCHING and isinstance(value, dict):
            ours.update(_batching(key, value))
        elif name in _OURS:
            ours[name] = value
        elif name in _THEIRS:
            theirs[name] = value
        else:
            raise invalid(f"{FIELD}.{key[:64]}", f"one of {', '.join(sorted(_OURS))}", key)
    made, as_is = models_pb2.ModelConfig(), model_config_pb2.ModelConfig()
    _fill(made, ours, sent)
    _fill(as_is, theirs, sent)
    return ConfigChange(made, tuple(ours), as_is, tuple(theirs), sent)


def _object(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
        # A name that is half a character ("\ud800") makes protobuf raise SystemError, and no message can tell of it.
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid(FIELD, "a JSON object", text[:100])
    return found


def _batching(key: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return Triton's message of this name in our words: its presence turns batching on."""
    found: dict[str, Any] = {_BATCHING: True}
    message = model_config_pb2.ModelDynamicBatching()
    sent = {_contract_name(name): f"{key}.{name}" for name in given}
    _fill(message, {_contract_name(name): value for name, value in given.items()}, sent)
    most = BATCH_DELAY_S_MAX * 1_000_000
    for field, value in message.ListFields():
        if field.name != _DELAY:
            raise _other(sent[field.name], "nothing but " + _DELAY, value)
        if value > most:
            raise _other(sent[field.name], f"0 to {most}", value)
        found["max_batch_delay"] = f"{value // 1_000_000}.{value % 1_000_000:06}s"
    return found


def _fill(message: Message, values: Mapping[str, Any], sent: Mapping[str, str]) -> None:
    """Set fields one by one, so that an error names its own, as it was sent."""
    for name, value in values.items():
        try:
            json_format.ParseDict({name: value}, message)
        except (json_format.ParseError, RecursionError):
            kind = message.DESCRIPTOR.full_name
            expected = f"what {kind}.{name[:64]} takes, as protobuf's JSON"
            raise _other(sent[name][:128], expected, value) from None


def _contract_name(key: str) -> str:
    """Return a field's name in the contract: protobuf's JSON may write it in camel case."""
    return _UPPER.sub(lambda letter: "_" + letter[0].lower(), key)


def _other(name: str, expected: str, actual: object) -> ModelhostError:
    return invalid(f"{FIELD}.{name}", expected, _shown(actual))


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    return (text[:77] + "..." if len(text) > 80 else text) or "empty"
