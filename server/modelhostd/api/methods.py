"""Methods as the server offers them: read from the descriptors, never listed by hand.

A servicer is a plain object with one coroutine function (or async generator, where the answer is a
stream) per method, named in snake case: ``LoadModel`` -> ``async def load_model(self, request, call)``.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from modelhost.v1 import options_pb2
from modelhostd.api.admission import Group
from modelhostd.api.errors import unimplemented
from modelhostd.api.unimplemented import UNIMPLEMENTED_METHODS
from modelhostd.core.values import dataclass

CONTROL_BYTES_MAX = 256 * 1024
SEND_LESS = "send less at once"
CONTROL_TIMEOUT_S = 120.0
"""The longest that a control method may take where nothing else bounds it."""

_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Method:
    """One method: what it takes, who may call it, and what answers.

    ``request`` None = the handler takes the raw bytes. ``timeout_s`` None = the handler bounds itself.
    A handler's answer may be a message or bytes that are encoded already.
    """

    path: str
    right: int
    handler: Callable[..., Any]
    request: type[Message] | None
    client_streaming: bool
    server_streaming: bool
    group: Group
    limit_bytes: int
    timeout_s: float | None
    too_large: str = SEND_LESS
    """What to do about a message above the limit."""

    @property
    def name(self) -> str:
        """The method's own name, ``LoadModel``."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Service:
    """A service to offer. The mappings override, by method name, what the descriptor says.

    ``rights`` is for services whose protos are not ours and state none: what it does not name is not
    offered, since such a service grows with the library that brings it. ``raw`` names methods whose
    handlers take bytes; ``limits`` are bytes of one message; ``timeouts`` seconds (None = the handler
    bounds itself).
    """

    descriptor: ServiceDescriptor
    servicer: object
    rights: Mapping[str, int] = field(default_factory=dict)
    raw: Collection[str] = ()
    groups: Mapping[str, Group] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    timeouts: Mapping[str, float | None] = field(default_factory=dict)
    too_large: Mapping[str, str] = field(default_factory=dict)
    """What to do about a message above the limit, where that is not to send less."""
    offered_as: str = ""
    """Another full name for it than the descriptor's."""

    @property
    def name(self) -> str:
        """The full name, ``modelhost.v1.ModelService``."""
        return self.offered_as or str(self.descriptor.full_name)

    def methods(self, control_bytes_max: int = CONTROL_BYTES_MAX) -> Mapping[str, Method]:
        """Return every method that is offered by its name."""
        return {
            m.name: self._method(m, control_bytes_max)
            for m in self.descriptor.methods
            if not self.rights or m.name in self.rights
        }

    def _method(self, method: MethodDescriptor, control_bytes_max: int) -> Method:
        name = method.name
        path = f"/{self.name}/{name}"
        lasting = method.server_streaming or method.client_streaming
        timeout = None if lasting else CONTROL_TIMEOUT_S
        return Method(
            path=path,
            right=self.rights.get(name) or method.GetOptions().Extensions[options_pb2.right],
            handler=self._handler(method.name, path),
            request=None if name in self.raw else GetMessageClass(method.input_type),
            client_streaming=method.client_streaming,
            server_streaming=method.server_streaming,
            group=self.groups.get(name, Group.STREAM if lasting else Group.CONTROL),
            limit_bytes=self.limits.get(name, control_bytes_max),
            timeout_s=self.timeouts.get(name, timeout),
            too_large=self.too_large.get(name, SEND_LESS),
        )

    def _handler(self, name: str, path: str) -> Callable[..., Any]:
        handler = getattr(self.servicer, snake(name), None)
        if path.removeprefix("/") in UNIMPLEMENTED_METHODS:
            assert handler is None, f"{path} is implemented: take it out of UNIMPLEMENTED_METHODS"
            return _missing(path)
        assert callable(handler), f"{type(self.servicer).__name__} lacks {snake(name)}"
        return handler  # type: ignore[no-any-return]


def snake(name: str) -> str:
    """Return a method's name in snake case: ``LoadModel`` -> ``load_model``."""
    return _WORD.sub("_", name).lower()


def _missing(path: str) -> Callable[..., Any]:
    def handler(*_: object) -> Any:
        raise unimplemented(path)

    return handler
