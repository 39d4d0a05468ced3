"""Reflection: clients without the protos ask the server for them (grpcurl, buf curl).

Both versions of the protocol, which are the same on the wire; and two pools of descriptors, because the
inference protocol has one of its own (``modelhost.oip``).
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection,
    reflection_pb2,
)

from modelhost.oip._pool import POOL
from modelhost.v1 import options_pb2
from modelhostd.api.calls import Call
from modelhostd.api.methods import Service

NAMES = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")


def reflection_services(offered: Sequence[str]) -> Sequence[Service]:
    """Return the services to offer, which tell of ``offered`` and of themselves."""
    servicer = Reflection([*offered, *NAMES])
    return [
        Service(
            reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
            servicer,
            rights={"ServerReflectionInfo": options_pb2.READ},
            offered_as=name,
        )
        for name in NAMES
    ]


class Reflection:
    """Answers from both pools."""

    def __init__(self, offered: Sequence[str]) -> None:
        self._answers = reflection.aio.ReflectionServicer(offered, pool=_Pools())

    async def server_reflection_info(
        self, requests: AsyncIterator[Any], call: Call
    ) -> AsyncIterator[Any]:
        """See ServerReflectionInfo in grpc.reflection."""
        # Such a stream may stay open for hours between two questions.
        found = call.until_shutdown(self._answers.ServerReflectionInfo(requests, None))
        async with aclosing(found) as answers:
            async for answer in answers:
                yield answer


class _Pools:
    """The part of a DescriptorPool that reflection uses, over two of them."""

    def __getattr__(self, name: str) -> Any:
        def find(*arguments: object) -> Any:
            try:
                return getattr(descriptor_pool.Default(), name)(*arguments)
            except KeyError:
                return getattr(POOL, name)(*arguments)

        return find
