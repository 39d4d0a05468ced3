"""Services on a real socket, and clients of them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from modelhostd.api.admission import Admission, AdmissionLimits
from modelhostd.api.calls import OPERATOR_RIGHTS, Caller, Calls
from modelhostd.api.methods import CONTROL_BYTES_MAX, Service
from modelhostd.api.wrapper import Wrapper

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),
)


@dataclass
class Serving:
    """A server under test: where it listens, and what its handlers share."""

    target: str
    wrapper: Wrapper
    calls: Calls
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    def channel(self, *options: tuple[str, int]) -> grpc.aio.Channel:
        """Return a new channel with a connection of its own; closed with the server."""
        own = ("grpc.use_local_subchannel_pool", 1)
        made = grpc.aio.insecure_channel(self.target, options=(*OPTIONS, own, *options))
        self.channels.append(made)
        return made


@asynccontextmanager
async def serving(services: Sequence[Service], *, stall_s: float = 30.0) -> AsyncIterator[Serving]:
    """Serve on a free port of loopback until the end of the block."""
    calls = Calls()
    wrapper = Wrapper(
        Caller("tester", OPERATOR_RIGHTS),
        calls,
        Admission(AdmissionLimits()),
        stall_s=stall_s,
    )
    server = grpc.aio.server(options=(*OPTIONS, ("grpc.per_message_decompression", 0)))
    server.add_generic_rpc_handlers(tuple(wrapper.handlers(services, CONTROL_BYTES_MAX)))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made = Serving(f"127.0.0.1:{port}", wrapper, calls)
    try:
        yield made
    finally:
        for channel in made.channels:
            await channel.close()
        calls.draining.set()
        await server.stop(0)
        await calls.wait_idle(5.0)


def info_of(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    """Return the ErrorInfo that an error of a call carries, of which there must be one."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    found = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            found.append(info)
    assert len(found) == 1, status
    return found[0]
