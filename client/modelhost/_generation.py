"""What is asked of text generation, and what comes of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from google.protobuf.descriptor import FieldDescriptor

from modelhost import _names
from modelhost._arguments import shown, text
from modelhost._enums import name_of
from modelhost._errors import invalid
from modelhost._inference import check_priority
from modelhost.v1 import inference_service_pb2 as pb

Prompt = str | Sequence[dict[str, str]]
"""A text to go on from, or a conversation: ``{"role": ..., "content": ...}`` for each message."""


class Sampling(TypedDict, total=False):
    """How text is made; see SamplingParameters of the contract for ranges and defaults."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    stop: str | Iterable[str]
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Generation:
    """A text that a model has made."""

    text: str
    finish_reason: str
    """``stop`` (the model, or a stop text, ended it), ``length``; empty where it is not at its end."""
    input_tokens: int
    """Tokens of the prompt."""
    output_tokens: int
    """Tokens of the text."""


_KINDS = {
    FieldDescriptor.TYPE_INT32: "an integer of 32 bits",
    FieldDescriptor.TYPE_INT64: "an integer of 64 bits",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_STRING: "a text, or several",
}
"""What a parameter may be, by the type of its field."""


def generate_request(
    model: str, prompt: Prompt, sampling: Sampling, *, version: int, priority: int, stream: bool
) -> pb.GenerateRequest:
    """Return the request for a text, in pieces with ``stream``. Raises InvalidArgument, also for what SamplingParameters do not have."""
    check_priority(priority)
    name = f"models/{_names.model_id(model)}"
    request = pb.GenerateRequest(
        model=name, version=version, priority=priority, whole_text=not stream
    )
    if isinstance(prompt, str):
        request.prompt = text("prompt", prompt)
    else:
        _add_messages(request, prompt)
    fields = request.sampling.DESCRIPTOR.fields_by_name
    for name, value in sampling.items():
        if name not in fields:
            raise invalid(name, f"one of {', '.join(fields)}", shown(value))
        try:
            if name == "stop":
                request.sampling.stop.extend([value] if isinstance(value, str) else value)  # type: ignore[arg-type]
            else:
                setattr(request.sampling, name, value)
        except (TypeError, ValueError, OverflowError):
            raise invalid(name, _KINDS[fields[name].type], shown(value)) from None
    return request


def _add_messages(request: pb.GenerateRequest, prompt: Any) -> None:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise invalid("prompt", "a text, or a list of messages", shown(prompt))
    for number, message in enumerate(prompt):
        try:
            request.messages.add(role=message["role"], content=message["content"])
            if len(message) > 2:
                raise ValueError
        except (TypeError, ValueError, KeyError):
            expected = "a dict of the texts role and content"
            raise invalid(f"prompt[{number}]", expected, shown(message)) from None


def read_piece(piece: pb.GenerateResponse) -> Generation:
    """Return what a piece says: its text, and the counts up to it."""
    number = piece.finish_reason
    word = name_of(pb.GenerateResponse.FinishReason, number).lower() if number else ""
    return Generation(piece.text, word, piece.input_token_count, piece.output_token_count)
