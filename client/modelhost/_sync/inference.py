# Made from modelhost/_async/inference.py by generate_sync.py: do not edit, change that.
"""Inference: arrays in, arrays out."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack, overload

import numpy as np
import numpy.typing as npt

from modelhost import _generation, _inference, _names, _tensors
from modelhost._errors import InvalidArgument, ModelhostError
from modelhost._sync.generation import TextStream
from modelhost._sync.transport import Transport
from modelhost.oip import open_inference_pb2
from modelhost.v1 import inference_service_pb2


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
        self,
        model: str,
        texts: Iterable[str],
        *,
        version: int = 0,
        priority: int = 0,
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the embeddings of texts, float32 of shape (texts, dimensions).

        ``priority`` from 1, the most urgent; 0 = as others. For models of the task ``feature-extraction``; raises
        InvalidArgument for another.
        """
        array = _tensors.text_array(texts)
        try:
            outputs = self.infer(
                model,
                {_inference.TEXT: array},
                outputs=[_inference.EMBEDDING],
                version=version,
                parameters=_inference.priority_parameter(priority),
                timeout=timeout,
            )
        except InvalidArgument as error:
            raise self._explained(model, error, timeout) from None
        return _inference.embeddings(model, outputs, len(array))

    def _explained(
        self, model: str, error: InvalidArgument, timeout: float | None
    ) -> InvalidArgument:
        """Return why a model gave no embeddings: its task, where that is another."""
        try:
            task = (self.describe(model, timeout=timeout)).task
        except ModelhostError:
            return error
        return error if task == _inference.FEATURES else _inference.other_task(model, task)

    def classify(
        self,
        model: str,
        texts: Iterable[str],
        *,
        top_k: int = 5,
        version: int = 0,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[_inference.Classification]:
        """Return for each text its ``top_k`` likeliest labels with their scores, the highest first.

        For models of the task ``text-classification``; raises InvalidArgument for another, as Classify
        of the contract does.
        """
        request = _inference.classify_request(
            model, texts, top_k, version=version, priority=priority
        )
        seconds = self._transport.options.infer_timeout if timeout is None else timeout
        response = self._transport.unary(self._transport.tasks.Classify, request, seconds)
        return _inference.classifications(response)

    @overload
    def generate(
        self,
        model: str,
        prompt: _generation.Prompt,
        *,
        stream: Literal[False] = False,
        version: int = 0,
        priority: int = 0,
        timeout: float | None = None,
        **sampling: Unpack[_generation.Sampling],
    ) -> _generation.Generation: ...

    @overload
    def generate(
        self,
        model: str,
        prompt: _generation.Prompt,
        *,
        stream: Literal[True],
        version: int = 0,
        priority: int = 0,
        timeout: float | None = None,
        **sampling: Unpack[_generation.Sampling],
    ) -> TextStream: ...

    def generate(
        self,
        model: str,
        prompt: _generation.Prompt,
        *,
        stream: bool = False,
        version: int = 0,
        priority: int = 0,
        timeout: float | None = None,
        **sampling: Unpack[_generation.Sampling],
    ) -> Any:
        """Write a text on, or answer in a conversation: a list of ``{"role": ..., "content": ...}``.

        Returns the whole text, or with ``stream`` its pieces as they come. ``max_tokens``,
        ``temperature``, ``stop`` and the others are those of SamplingParameters; what is not given is the
        model's default. For models of the task ``text-generation``; raises InvalidArgument for another,
        and for ``messages`` where the model has no chat template. ``timeout`` is for the whole text.
        """
        request = _generation.generate_request(
            model, prompt, sampling, version=version, priority=priority, stream=stream
        )
        seconds = self._transport.options.infer_timeout if timeout is None else timeout
        pieces = TextStream(
            self._transport.stream(self._transport.tasks.Generate, request, seconds)
        )
        return pieces if stream else pieces.read_all()

    def describe(
        self, model: str, *, timeout: float | None = None
    ) -> inference_service_pb2.ModelDescription:
        """Return what to send to a model and what comes back, with examples; loads it where need be."""
        request = inference_service_pb2.DescribeModelRequest(
            model=f"models/{_names.model_id(model)}"
        )
        seconds = self._transport.options.infer_timeout if timeout is None else timeout
        return self._transport.unary(self._transport.tasks.DescribeModel, request, seconds)

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
