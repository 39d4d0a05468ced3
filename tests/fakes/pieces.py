"""What a fake worker answers to a stream: the pieces that a test wants, through a gate."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from modelhostd.ports import InferReply, LoadSpec
from tests.fakes.gates import ModelGates


class Pieces(ModelGates):
    """``pieces``: the responses of decoupled models, by model; ``last_is_known``: whether the last one says so."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: dict[str, Callable[[LoadSpec, bytes], Sequence[bytes]]] = {}
        self.last_is_known = True


async def in_pieces(
    workers: Pieces, infer: Awaitable[InferReply], spec: LoadSpec | None, payload: bytes
) -> AsyncGenerator[InferReply, None]:
    """Yield the pieces of a model, or its one answer. Each but the first passes the model's piece gate."""
    first = await infer
    if spec is None or spec.model not in workers.pieces:
        yield first
        return
    pieces = workers.pieces[spec.model](spec, payload)
    for number, piece in enumerate(pieces):
        if number:
            await workers.piece_gate(spec.model).wait()
        last = workers.last_is_known and number == len(pieces) - 1
        yield first._replace(payload=piece, item_count=int(number == 0), last=last)
