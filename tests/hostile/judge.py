"""What any answer of the daemon must be like, whatever was asked: well, or an error of its own kind."""

import zlib

import grpc

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.errors import REASONS, Reason
from tests.api.support import Failure, failure_of

MESSAGE_CHARACTERS_MIN = 15


def typed(error: grpc.RpcError) -> Failure:
    """Return what an error carries; fails unless it is one that the contract names.

    ``INTERNAL`` is a bug, whoever asked for what.
    """
    found = failure_of(error)  # type: ignore[arg-type]  # has what an aio error has
    said = f"{found.code.name}: {found.message!r} {found.details}"
    assert found.reason in Reason.__members__, f"no reason of the contract: {said}"
    spec = REASONS[Reason(found.reason)]
    assert found.code.value[0] == int(spec.code), f"not the code of {found.reason}: {said}"
    assert found.code is not grpc.StatusCode.INTERNAL, said
    assert found.metadata.keys() <= set(spec.keys), f"other keys than the contract's: {said}"
    assert len(found.message) >= MESSAGE_CHARACTERS_MIN, said
    assert found.message.isprintable(), f"unprintable: {said}"
    assert found.request_id, f"no x-request-id: {said}"
    return found


def check_answer(asked: bytes, answered: bytes) -> None:
    """Compare an identity model's answer with what protobuf itself reads of the request."""
    request = oip.ModelInferRequest.FromString(plain(asked))
    response = oip.ModelInferResponse.FromString(answered)
    assert response.model_name == request.model_name
    assert response.id == request.id
    wanted = [o.name for o in request.outputs] or [i.name for i in request.inputs]
    assert [o.name for o in response.outputs] == wanted
    assert len(response.raw_output_contents) == len(wanted)
    inputs = {i.name: i for i in request.inputs}
    tops = {o.name for o in request.outputs if "classification" in o.parameters}
    sent = {}
    if request.raw_input_contents:
        sent = dict(zip((i.name for i in request.inputs), request.raw_input_contents, strict=True))
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name in tops:
            assert output.datatype == "BYTES"
            continue
        assert output.datatype == inputs[output.name].datatype
        assert list(output.shape) == list(inputs[output.name].shape)
        expected = sent.get(output.name, content)
        if output.datatype == "BOOL":
            expected = bytes(byte != 0 for byte in expected)
        assert content == expected


def plain(message: bytes) -> bytes:
    """Return a message as it was before it was compressed, if all of it is one of gzip or zlib."""
    inflater = zlib.decompressobj(47)  # either, by its head
    try:
        found = inflater.decompress(message)
    except zlib.error:
        return message
    return found if inflater.eof and not inflater.unused_data else message
