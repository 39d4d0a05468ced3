"""What a request says of how text is generated: names of the field, ranges, defaults of the model.

Names and meanings are those of vLLM and of Triton's backend for it (https://docs.vllm.ai, "Sampling
Parameters"). They come as request parameters, or as a JSON object in input ``sampling_parameters``, whose
values Triton's own examples write as texts.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Any, TypeGuard

from modelhostd.core.values import dataclass
from modelhostd.worker.backend import BadInputError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_NUMBER_CHARACTERS = 40
MAX_JSON_BYTES = 64 * 1024
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Parameters:
    """How one text is generated. ``temperature`` 0 = always the likeliest token."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class _Number:
    """A number between two bounds; ``whole`` = an integer, ``above`` = the lower bound itself is not in it."""

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def __call__(self, name: str, value: object) -> Any:
        kind = "an integer" if self.whole else "a number"
        expected = f"{kind} {'above' if self.above else 'from'} {self.low} to {self.high}"
        number: float
        try:
            if not _is_number_like(value):
                raise ValueError
            number = int(value) if self.whole and not isinstance(value, float) else float(value)
        except ValueError:
            raise BadInputError(name, expected, value) from None
        if not math.isfinite(number) or (self.whole and number != int(number)):
            raise BadInputError(name, expected, value)
        if not self.low <= number <= self.high or (self.above and number == self.low):
            raise BadInputError(name, expected, value)
        return int(number) if self.whole else number


def _is_number_like(value: object) -> TypeGuard[int | float | str]:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    return len(str(value)) <= MAX_NUMBER_CHARACTERS


def _flag(name: str, value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise BadInputError(name, "true or false", value)
    return value


def _stops(name: str, value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    expected = f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters"
    if len(texts) > MAX_STOPS:
        raise BadInputError(name, expected, f"{len(texts)} texts")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise BadInputError(
                name, expected, text if isinstance(text, str) else type(text).__name__
            )
    return tuple(texts)


_READERS: Mapping[str, Callable[[str, object], Any]] = {
    "max_tokens": _Number(1, 2**24, whole=True),
    "temperature": _Number(0, 100),
    "top_p": _Number(0, 1, above=True),
    "top_k": _Number(-1, 2**24, whole=True),
    "min_p": _Number(0, 1),
    "repetition_penalty": _Number(0, 100, above=True),
    "seed": _Number(0, 2**63 - 1, whole=True),
    "stop": _stops,
    "ignore_eos": _flag,
    "skip_special_tokens": _flag,
}
NAMES = tuple(_READERS)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the model's ``generation_config.json`` says: how to sample, and which tokens end a text."""

    parameters: Parameters = field(default_factory=Parameters)
    end_tokens: frozenset[int] = frozenset()


def read_defaults(generation: Mapping[str, Any], config: Mapping[str, Any]) -> Defaults:
    """Return the defaults of a model's files; what is out of range there is left out."""
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    end_tokens = frozenset(one for one in ends if isinstance(one, int))
    chosen: dict[str, Any] = {}
    names = {"max_new_tokens": "max_tokens", "repetition_penalty": "repetition_penalty"}
    if generation.get("do_sample") is True:
        chosen["temperature"] = 1.0
        names |= {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
    for theirs, ours in names.items():
        value = generation.get(theirs)
        if value is not None:
            try:
                chosen[ours] = _READERS[ours](ours, value)
            except BadInputError:
                continue
    return Defaults(replace(Parameters(), **chosen), end_tokens)


def read(
    defaults: Parameters, parameters: Mapping[str, object], encoded: bytes | None
) -> Parameters:
    """Return the parameters of a request: its own, over those in JSON, over the model's.

    Raises :class:`BadInputError` naming the parameter, also for one that nobody knows.
    """
    given = {**(_decode(encoded) if encoded else {}), **parameters}
    chosen: dict[str, Any] = {}
    for key, value in given.items():
        reader = _READERS.get(key)
        if reader is None:
            raise BadInputError(f"parameters[{key[:64]}]", "one of " + ", ".join(NAMES), key)
        chosen[key] = reader(f"parameters[{key}]", value)
    return replace(defaults, **chosen)


def _decode(encoded: bytes) -> dict[str, object]:
    name = "sampling_parameters"
    found = read_json(name, encoded, MAX_JSON_BYTES, "a JSON object")
    if not isinstance(found, dict):
        raise BadInputError(name, "a JSON object", type(found).__name__)
    return found


def read_json(name: str, encoded: bytes, most_bytes: int, expected: str) -> Any:
    """Return what an input in JSON says. Raises :class:`BadInputError` naming it, also where a text of it is none."""
    if len(encoded) > most_bytes:
        raise BadInputError(name, f"at most {most_bytes} bytes", len(encoded))
    try:
        found = json.loads(encoded)
        # JSON can name half a character, which neither a tokenizer takes nor a message holds.
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadInputError(name, "whole characters", "half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(name, expected, f"{error}"[:100]) from None
    return found
