"""What any answer of the daemon must be like, whatever was asked: well, or an error of its own kind."""

import grpc

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
