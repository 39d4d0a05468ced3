"""Recognises requests that are like one before but for their id and their tensors' bytes.

Clients send the same request again and again, with other numbers in it. One whose bytes are the same as those of a
request that passed every check, in all places but the id and the raw contents, passes them too: what they look at is
the same. Not looking again saves a fifth of the worker's CPU time for a request (bench/RESULTS.md).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from modelhostd.core.errors import ModelhostError
from modelhostd.core.values import dataclass
from modelhostd.worker import fields, oip
from modelhostd.worker.backend import Signature, Tensor
from modelhostd.worker.classification import Top
from modelhostd.worker.tensors import DATATYPES

_PLAIN = frozenset(DATATYPES) - {"BOOL", "BYTES"}
"""Datatypes of which any bytes of the right number are a tensor."""

FORMS_MAX = 256
"""Requests that are remembered of one instance; one of each length in bytes."""
SAME_BYTES_MAX = 2048
"""Of a request beside id and raw contents, to be remembered."""


@dataclass(slots=True)
class _Form:
    """A request that passed, without its id and its tensors' bytes."""

    name: str
    same: tuple[tuple[int, int, bytes], ...]
    """What has to be in a request again, and where."""
    id: fields.Span
    tensors: tuple[tuple[str, str, np.dtype[Any], tuple[int, ...], int, int], ...]
    """Name, datatype, numpy's, shape, and where the bytes are."""
    outputs: tuple[str, ...]
    parameters: Mapping[str, oip.Parameter]
    item_count: int
    tops: Mapping[str, Top]
    heads: dict[oip.Answer, bytes]


class Forms:
    """The requests that one instance remembers. Any thread may ask: each look and each change is one step."""

    def __init__(self) -> None:
        self._by_length: dict[int, _Form] = {}

    def parse(
        self,
        payload: bytes | memoryview,
        *,
        name: str,
        version: int,
        signature: Signature,
        most_bytes: int = oip.MOST_BYTES,
    ) -> oip.ParsedRequest:
        """Return what :func:`modelhostd.worker.oip.parse` does, and raise what it does."""
        form = self._by_length.get(len(payload))
        if form is not None and form.name == name:
            for start, end, same in form.same:
                if payload[start:end] != same:
                    break
            else:
                start, end = form.id
                try:
                    return oip.ParsedRequest(
                        str(payload[start:end], "utf-8"),
                        name,
                        {
                            of: Tensor(datatype, np.frombuffer(payload[a:b], dtype).reshape(shape))
                            for of, datatype, dtype, shape, a, b in form.tensors
                        },
                        form.outputs,
                        dict(form.parameters),
                        form.item_count,
                        form.tops,
                        form.heads,
                    )
                except UnicodeDecodeError:
                    pass  # is refused below
        parsed = oip.parse(
            payload, name=name, version=version, signature=signature, most_bytes=most_bytes
        )
        self._remember(payload, parsed)
        return parsed

    def _remember(self, payload: bytes | memoryview, parsed: oip.ParsedRequest) -> None:
        if any(tensor.datatype not in _PLAIN for tensor in parsed.inputs.values()):
            return
        try:
            ids, raw = fields.holes(memoryview(payload))
        except ModelhostError:
            return  # well-formed for protobuf, but nothing that clients send
        if len(ids) > 1 or len(raw) != len(parsed.inputs):
            return
        id_span = ids[0] if ids else (0, 0)
        spans = [(start, end) for _, start, end in raw]
        cuts = sorted((id_span, *spans))
        starts, ends = (0, *(end for _, end in cuts)), (*(start for start, _ in cuts), len(payload))
        same = [(a, b, bytes(payload[a:b])) for a, b in zip(starts, ends, strict=True) if a < b]
        if sum(len(part) for _, _, part in same) > SAME_BYTES_MAX:
            return
        if len(self._by_length) >= FORMS_MAX:
            self._by_length.clear()
        self._by_length[len(payload)] = _Form(
            parsed.model_name,
            tuple(same),
            id_span,
            tuple(
                (name, tensor.datatype, tensor.array.dtype, tensor.array.shape, *span)
                for (name, tensor), span in zip(parsed.inputs.items(), spans, strict=True)
            ),
            parsed.outputs,
            dict(parsed.parameters),
            parsed.item_count,
            parsed.tops,
            parsed.heads,
        )
