# Made from modelhost/_async/inference.py by generate_sync.py: do not edit, change that.
"""Inference: arrays in, arrays out."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from modelhost import _inference, _names, _tensors
from modelhost._sync.transport import Transport
from modelhost.oip import open_inference_pb2


class Inference:
    """What ``Client`` asks models."""

    _transport: Transport

    def infer(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        outputs: Iterable[str] = (),
        version: int = 0,
        datatypes: Mapping[str, str] | None = None,
        parameters: Mapping[str, _tensors.Parameter] | None = None,
        timeout: float | None = None,
    ) -> dict[str, _tensors.Array]:
        """Run a model, a model's id or a slot's, on named arrays and return its outputs by name.

        A model that is on disk and not loaded is loaded first, if its config allows. ``outputs`` empty =
        all; ``version`` 0 = the current one; ``datatypes`` for what numpy has no type for (BF16).
        Strings are BYTES. The arrays that come back are read-only. ``timeout`` in seconds, None = the
        client's ``infer_timeout``. Never repeated by itself. Raises NotFound, InvalidArgument (with what
        is expected), OutOfMemory, QueueFull, PreconditionFailed, Unavailable, Timeout, Internal.
        """
        request = _tensors.infer_request(
            _names.model_id(model),
            inputs,
            outputs=outputs,
            version=str(version) if version else "",
            datatypes=datatypes,
            parameters=parameters,
        )
        seconds = self._transport.options.infer_timeout if timeout is None else timeout
        response = self._transport.unary(self._transport.inference.ModelInfer, request, seconds)
        return _tensors.infer_result(response)

    def embed(
        self, model: str, texts: Iterable[str], *, timeout: float | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the embeddings of texts, float32 of shape (texts, dimensions).

        For models of the task ``feature-extraction``; raises InvalidArgument for another.
        """
        array = _tensors.text_array(texts)
        outputs = self.infer(
            model, {_inference.TEXT: array}, outputs=[_inference.EMBEDDING], timeout=timeout
        )
        return _inference.embeddings(model, outputs, len(array))

    def classify(
        self, model: str, texts: Iterable[str], *, timeout: float | None = None
    ) -> list[_inference.Classification]:
        """Return for each text its best label, the score of it, and those of all classes.

        For models of the task ``text-classification``; raises InvalidArgument for another.
        """
        array = _tensors.text_array(texts)
        outputs = self.infer(
            model,
            {_inference.TEXT: array},
            outputs=[_inference.LABEL, _inference.SCORES],
            timeout=timeout,
        )
        return _inference.classifications(model, outputs, len(array))

    def metadata(self, model: str, *, version: int = 0) -> open_inference_pb2.ModelMetadataResponse:
        """Return the names, datatypes and shapes of a model's inputs and outputs (-1 = any size)."""
        request = open_inference_pb2.ModelMetadataRequest(
            name=_names.model_id(model), version=str(version) if version else ""
        )
        return self._transport.unary(self._transport.inference.ModelMetadata, request)

    def ready(self, model: str) -> bool:
        """Whether a request would be served now: loaded, or on disk and loaded on demand."""
        request = open_inference_pb2.ModelReadyRequest(name=_names.model_id(model))
        answer = self._transport.unary(self._transport.inference.ModelReady, request)
        return answer.ready
