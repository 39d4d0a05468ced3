"""What a client makes of a failed call, whoever answered it and with whatever bytes."""

from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from modelhost import ModelhostError, _status
from tests.hostile.messages import mutated


@dataclass
class Failed:
    """A call that failed: its status, and what came behind it."""

    status: grpc.StatusCode
    text: str | None
    trailers: tuple[tuple[str, str | bytes], ...]

    def code(self) -> grpc.StatusCode:
        """Return the status."""
        return self.status

    def details(self) -> str | None:
        """Return its text."""
        return self.text

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the trailers."""
        return self.trailers


_INFO = error_details_pb2.ErrorInfo(reason="X", domain="modelhost", metadata={"model": "m"})
_details = st.builds(
    AnyMessage,
    type_url=st.sampled_from(["google.rpc.ErrorInfo", "google.rpc.RetryInfo", "x", ""]).map(
        "type.googleapis.com/{}".format
    ),
    value=st.binary(max_size=30) | mutated(_INFO.SerializeToString()),
)
_trailers = st.lists(_details, max_size=3).map(
    lambda details: status_pb2.Status(code=3, details=details).SerializeToString()
)


@given(
    st.sampled_from([code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]),
    st.none() | st.text(max_size=60) | st.just("RST_STREAM") | st.just("larger than max (5 vs. 4)"),
    st.binary(max_size=60) | _trailers,
    st.text(max_size=5) | st.binary(max_size=5),
)
def test_any_failure_of_a_call_becomes_an_error_of_the_client(
    code: grpc.StatusCode, text: str | None, details: bytes, request_id: str | bytes
) -> None:
    """Whoever answered, the caller gets the client's own exception, with a reason and a message."""
    trailers = ((_status.DETAILS_KEY, details), (_status.REQUEST_ID_KEY, request_id))
    error = _status.error_from_rpc(
        Failed(code, text, trailers), call="GetModel", target="t", timeout=1.0
    )
    assert isinstance(error, ModelhostError)
    assert str(error)
