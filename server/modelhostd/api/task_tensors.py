"""Between the messages of InferenceService and tensors: requests of the Open Inference Protocol, and answers to them.

An embedding is never parsed: the packed floats of a message are, byte for byte, a row of a raw FP32 tensor.
"""

import json
import struct
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from modelhost.oip import open_inference_pb2
from modelhost.v1 import inference_service_pb2
from modelhostd.api.encoding import entry, key
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.raw_tensors import pack_texts, unpack_texts
from modelhostd.core.stand_ins import PARAMETER

_oip = open_inference_pb2
_pb = inference_service_pb2

TEXTS_MAX = 1024
MESSAGES_MAX = 1024
TOP_K_DEFAULT = 5
TOP_K_MAX = 1000
FLOAT_BYTES = 4

_EMBEDDINGS = key(_pb.EmbedResponse.EMBEDDINGS_FIELD_NUMBER)
_VALUES = key(_pb.Embedding.VALUES_FIELD_NUMBER)
_UINT32 = struct.Struct("<I")
_FINISH = {"stop": _pb.GenerateResponse.STOP, "length": _pb.GenerateResponse.LENGTH}


# --- requests -------------------------------------------------------------------------------------


def embed_request(model: str, texts: Sequence[str]) -> bytes:
    """Return the encoded request for the embeddings of texts. Raises INVALID_ARGUMENT."""
    request = _of_texts(model, texts)
    request.outputs.add(name="embedding")
    return request.SerializeToString()


def classify_request(model: str, texts: Sequence[str], top_k: int) -> bytes:
    """Return the encoded request for the highest scores with their labels. Raises INVALID_ARGUMENT."""
    if not 0 <= top_k <= TOP_K_MAX:
        raise invalid("top_k", f"0 to {TOP_K_MAX}", top_k)
    request = _of_texts(model, texts)
    output = request.outputs.add(name="scores")
    output.parameters["classification"].int64_param = top_k or TOP_K_DEFAULT
    return request.SerializeToString()


def generate_request(model: str, asked: _pb.GenerateRequest) -> bytes:
    """Return the encoded request for a text, in pieces unless it asks for the whole. Raises INVALID_ARGUMENT."""
    if bool(asked.prompt) == bool(asked.messages):
        found = "both" if asked.prompt else "neither"
        raise invalid("prompt", "either prompt or messages", found)
    if len(asked.messages) > MESSAGES_MAX:
        raise invalid("messages", f"at most {MESSAGES_MAX} messages", len(asked.messages))
    request = _oip.ModelInferRequest(model_name=model)
    if asked.prompt:
        _add_text(request, "text_input", asked.prompt)
    else:
        said = [{"role": one.role, "content": one.content} for one in asked.messages]
        _add_text(request, "messages", json.dumps(said, ensure_ascii=False))
    sampling = {field.name: value for field, value in asked.sampling.ListFields()}
    if sampling:
        if asked.sampling.stop:
            sampling["stop"] = list(asked.sampling.stop)
        _add_text(request, "sampling_parameters", json.dumps(sampling))
    request.inputs.add(name="stream", datatype="BOOL", shape=[1])
    request.raw_input_contents.append(bytes([not asked.whole_text]))
    return request.SerializeToString()


def _of_texts(model: str, texts: Sequence[str]) -> _oip.ModelInferRequest:
    if not 0 < len(texts) <= TEXTS_MAX:
        raise invalid("texts", f"1 to {TEXTS_MAX} texts", len(texts))
    request = _oip.ModelInferRequest(model_name=model)
    request.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    request.raw_input_contents.append(pack_texts(texts))
    return request


def _add_text(request: _oip.ModelInferRequest, name: str, text: str) -> None:
    request.inputs.add(name=name, datatype="BYTES", shape=[1])
    request.raw_input_contents.append(pack_texts([text]))


def own_words(error: ModelhostError) -> ModelhostError:
    """Return a worker's refusal in the names of the request's own fields, where it names tensors or parameters."""
    field = error.metadata.get("field", "")
    name, bracket, rest = field.partition("[")
    own = {
        "text": f"texts{bracket}{rest}",
        "text_input": "prompt",
        "messages": field,
        "sampling_parameters": "sampling",
        "parameters": f"sampling.{rest.removesuffix(']')}",
    }.get(name)
    if own is None or error.reason is not Reason.INVALID_ARGUMENT:
        return error
    expected = error.metadata.get("expected", "")
    told = expected.replace("text_input", "prompt")
    message = own + error.message.removeprefix(field).replace(expected, told)
    return ModelhostError(error.reason, message, {**error.metadata, "field": own, "expected": told})


# --- answers --------------------------------------------------------------------------------------


class Answer:
    """One encoded ModelInferResponse, and its tensors by name."""

    def __init__(self, model: str, payload: bytes) -> None:
        """Raises INFERENCE_FAILED for bytes that are no answer; ``model`` was asked."""
        self._asked = model
        try:
            self._response = _oip.ModelInferResponse.FromString(payload)
        except DecodeError:
            raise self.unlike("an encoded ModelInferResponse") from None
        by = self._response.parameters[PARAMETER.decode()].string_param
        self.model = f"models/{by or model}"
        self.version = int(self._response.model_version or 0)

    def raw(self, name: str, datatype: str, rank: int) -> tuple[Sequence[int], bytes]:
        """Return a tensor's shape and raw contents. Raises INFERENCE_FAILED where it is not as the task has it."""
        response = self._response
        found = zip(response.outputs, response.raw_output_contents, strict=False)
        for output, raw in found:
            if output.name == name and output.datatype == datatype and len(output.shape) == rank:
                return output.shape, raw
        raise self.unlike(f"{datatype} {name} of {rank} dimensions")

    def texts(self, name: str, rank: int) -> tuple[Sequence[int], list[str]]:
        """Return the shape and the elements of a tensor of texts. Raises INFERENCE_FAILED."""
        shape, raw = self.raw(name, "BYTES", rank)
        count = 1
        for size in shape:
            count *= size
        try:
            return shape, unpack_texts(raw, count)
        except ValueError as error:
            raise self.unlike(f"{name} as its shape says", str(error)) from None

    def number(self, name: str) -> int:
        """Return a tensor's one number. Raises INFERENCE_FAILED."""
        _, raw = self.raw(name, "UINT32", 1)
        if len(raw) != _UINT32.size:
            raise self.unlike(f"one number as {name}")
        (number,) = _UINT32.unpack(raw)
        return int(number)

    def unlike(self, expected: str, found: str = "") -> ModelhostError:
        """Return the error of an answer that is not what the model's task gives."""
        return ModelhostError(
            Reason.INFERENCE_FAILED,
            f"model '{self._asked}' did not answer as its task does: no {expected}"
            + (f" ({found})" if found else "")
            + "; look at ModelMetadata, and call ModelInfer for what it has",
            {"model": self._asked},
        )


def embed_response(answer: Answer, count: int) -> bytes:
    """Return the encoded EmbedResponse to ``count`` texts. Raises INFERENCE_FAILED."""
    shape, raw = answer.raw("embedding", "FP32", 2)
    size = shape[1] * FLOAT_BYTES
    if shape[0] != count or size <= 0 or len(raw) != count * size:
        raise answer.unlike(f"embedding of {count} rows")
    rows = (entry(_VALUES, raw[at : at + size]) for at in range(0, len(raw), size))
    tail = _pb.EmbedResponse(model=answer.model, version=answer.version)
    return b"".join([*(entry(_EMBEDDINGS, row) for row in rows), tail.SerializeToString()])


def classify_response(answer: Answer, count: int) -> _pb.ClassifyResponse:
    """Return the ClassifyResponse to ``count`` texts. Raises INFERENCE_FAILED."""
    shape, found = answer.texts("scores", 2)
    if shape[0] != count:
        raise answer.unlike(f"scores of {count} rows")
    made = _pb.ClassifyResponse(model=answer.model, version=answer.version)
    for row in range(count):
        labels = [_label(answer, text) for text in found[row * shape[1] : (row + 1) * shape[1]]]
        made.classifications.add(labels=labels)
    return made


def _label(answer: Answer, text: str) -> _pb.Classification.Label:
    """Return one element of the classification extension: ``score:index`` or ``score:index:label``."""
    score, _, rest = text.partition(":")
    index, _, name = rest.partition(":")
    try:
        return _pb.Classification.Label(name=name or index, score=float(score), index=int(index))
    except ValueError:
        raise answer.unlike("score:index:label", text[:64]) from None


def generate_response(answer: Answer) -> _pb.GenerateResponse:
    """Return one piece of a text. Raises INFERENCE_FAILED."""
    _, (text,) = answer.texts("text_output", 1)
    _, (reason,) = answer.texts("finish_reason", 1)
    return _pb.GenerateResponse(
        text=text,
        finish_reason=_FINISH.get(reason, _pb.GenerateResponse.FINISH_REASON_UNSPECIFIED),
        input_token_count=answer.number("num_input_tokens"),
        output_token_count=answer.number("num_output_tokens"),
        model=answer.model,
        version=answer.version,
    )
