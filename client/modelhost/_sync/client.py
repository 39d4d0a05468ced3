# Made from modelhost/_async/client.py by generate_sync.py: do not edit, change that.
"""``Client``: the connection to one daemon."""

from types import TracebackType
from typing import Self

from modelhost._arguments import checked
from modelhost._options import MESSAGE_BYTES_MAX, make_options
from modelhost._sync.batches import Batches
from modelhost._sync.events import Events
from modelhost._sync.files import Files
from modelhost._sync.holds import Holds
from modelhost._sync.host import Host
from modelhost._sync.inference import Inference
from modelhost._sync.residency import Residency
from modelhost._sync.transport import Transport


@checked
class Client(Batches, Files, Residency, Holds, Inference, Events, Host):
    """A connection to a modelhost daemon, made when it is first used.

    ::

        with Client() as client:
            client.pull("hf://org/name", name="e5", progress=True)
            vectors = client.embed("e5", ["one text", "another"])

    ``target`` is ``host:port`` or ``unix:/path``; without one MODELHOST_TARGET, then the socket of the
    service or of the user's own daemon if one answers (that of operators where the user may open it), then
    127.0.0.1:7411. ``timeout`` is the deadline
    in seconds of every call that names none, ``infer_timeout`` that of inference. With ``retries``, calls
    that are safe to repeat are repeated for up to about 3 s while the daemon is away. Models, devices and
    operations are named by id (``e5``) or resource name (``models/e5``); what comes back are the messages of
    ``modelhost.v1``. Every failure is a ``ModelhostError``.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float = 30.0,
        infer_timeout: float = 300.0,
        retries: bool = True,
        max_message_bytes: int = MESSAGE_BYTES_MAX,
    ) -> None:
        options = make_options(
            target,
            timeout=timeout,
            infer_timeout=infer_timeout,
            retries=retries,
            max_message_bytes=max_message_bytes,
        )
        self._transport = Transport(options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.target}>"

    @property
    def target(self) -> str:
        """Where the daemon is: ``host:port`` or ``unix:/path``."""
        return self._transport.options.target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls and watches that still run end."""
        self._transport.close()
