"""Serves text models with the transformers library: sentence embeddings and text classification.

Safetensors only, from the model's own folder only, and never with code of the model's own. Weights are read
here, not by the library: it maps the file, cannot tell how far it is, and cannot be cancelled.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from modelhostd.worker.backend import (
    Array,
    Backend,
    BadInputError,
    HealthReport,
    InferContext,
    LoadContext,
    LoadError,
    Output,
    Signature,
    Tensor,
)
from modelhostd.worker.backends import files, text
from modelhostd.worker.backends.building import (
    build,
    compiled,
    find_device,
    prepare,
    read_config,
)
from modelhostd.worker.backends.linear import use_onednn
from modelhostd.worker.backends.pooling import read_recipe
from modelhostd.worker.backends.tasks import FeatureExtraction, Task, TextClassification
from modelhostd.worker.backends.tokenizing import SHELF, Taken
from modelhostd.worker.team import take_team

OPTIONS = {
    "feature-extraction": ("pooling", "normalize", "compile"),
    "text-classification": ("compile",),
}

CANARY = "The quick brown fox jumps over the lazy dog."
CANARY_TOLERANCE = 1e-2
"""Of the canary's first answer, relative: far above rounding, far below what a broken device answers."""


class TransformersBackend(Backend):
    """Tasks ``feature-extraction`` and ``text-classification``.

    Inputs: BYTES ``text`` [-1] or [-1, 1], or INT64 ``input_ids`` and ``attention_mask`` (and
    ``token_type_ids`` where the model has them) [-1, -1]. Texts are cut at the model's longest input.
    Options: ``pooling`` and ``normalize`` for embeddings, over what the model's files say; ``compile`` to have
    torch compile the model while it is loaded, which takes minutes. A compiled model is not kept in host memory: it would be
    compiled again each time that its weights come back to another place.
    """

    tasks = frozenset(OPTIONS)
    packages = ("torch", "transformers", "safetensors")
    platform: ClassVar[str] = "pytorch_transformers"
    hands_over = True
    takes_state = True
    may_leave_cycles = False

    def __init__(self) -> None:
        self._model: Any = None
        self._call: Any = None
        """The model, or what torch compiled of it."""
        self._tokenizer: Any = None
        self._taken: Taken | None = None
        self._pads_by_another = False
        """Whether the tokenizer came without a token for padding."""
        self._well = False
        """Whether the last canary was answered, so that what answered it can be kept."""
        self._task: Task
        self._limits: text.TextLimits
        self._max_batch_size = 0
        self._price = 0.0
        self._device = torch.device("cpu")
        self._canary: dict[str, Array] | None = None

    @classmethod
    def prepare(cls) -> Mapping[str, str]:
        """Import the libraries and have them be quiet."""
        import transformers

        # Names are looked up on first use: each of these imports what stands behind it.
        _ = (transformers.AutoConfig, transformers.AutoTokenizer, transformers.MODEL_MAPPING)
        _ = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        return prepare()

    def load(self, context: LoadContext) -> None:
        """Load tokenizer, configuration and weights."""
        unknown = set(context.options) - set(OPTIONS.get(context.task, ()))
        if unknown:
            known = ", ".join(OPTIONS.get(context.task, ())) or "none"
            raise BadInputError("backend_options", known, min(unknown))
        files.refuse_custom_code(context.model_dir)
        config = read_config(context.model_dir)
        # A language model would keep keys and values of every layer for a next token that nobody asks for.
        config.use_cache = False
        self._taken = SHELF.take(context.model_dir)
        self._tokenizer = self._taken.tokenizer
        self._pads_by_another = self._tokenizer.pad_token is None
        if self._pads_by_another:
            # Generative models come without one; what pads is masked out, so any token will do.
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        recipe = read_recipe(context.model_dir, context.options)
        self._task = (
            TextClassification(config)
            if context.task == "text-classification"
            else FeatureExtraction(config, recipe)
        )
        self._limits = text.find_limits(
            config, self._tokenizer, context.max_sequence_length, recipe.max_tokens
        )
        self._max_batch_size = context.max_batch_size
        self._device = find_device(context.device)
        self._price = text.pass_price(self._device, context.compute_threads)
        compiles = context.options.get("compile", False)
        if not isinstance(compiles, bool):
            raise BadInputError("compile", "true or false", compiles)
        if compiles:
            # It is not imaged, so what it is read into is its own, and it goes to the device here.
            context.memory = None
        self._model = build(context, config, self._task.mapping(), may_lack=self._task.may_lack)
        self._call = self._model
        if compiles:
            if context.compute_threads:
                # It is compiled for a number of threads: this load has as many as requests will, until it ends.
                take_team(context.compute_threads)
            self._call = compiled(self._model.to(self._device))
            warm_up(self, context)
        else:
            use_onednn(self._model, self._device)

    def signature(self) -> Signature:
        """Return text in, the task's outputs out."""
        first, *others = text.inputs_of(self._limits)
        return Signature(
            inputs=first,
            alternatives=tuple(others),
            outputs=self._task.outputs,
            batched=True,
            max_batch_size=self._max_batch_size,
            joinable=True,
            parameters=frozenset(),
        )

    def alike(self, inputs: Mapping[str, Tensor]) -> tuple[Hashable, int]:
        """Texts go with texts, tokens with tokens; the length is that of the longest, where it matters."""
        if "text" in inputs:
            array = inputs["text"].array
            if self._price < math.inf:
                # Long and short ones are put into passes of their own.
                return ("text", array.ndim), 0
            return ("text", array.ndim), max(map(len, array.reshape(-1).tolist()), default=0)
        return tuple(sorted(inputs)), inputs["input_ids"].array.shape[1]

    def join(self, requests: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Put the items one behind the other; tokens are padded to the longest."""
        if "text" in requests[0]:
            return super().join(requests)
        return text.join_tokens(requests, self._tokenizer.pad_token_id or 0)

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Run all items, a few at a time, and put the answers back in the items' order."""
        if "text" in inputs:
            texts = text.decode(inputs["text"].array)
            items = len(texts)
            batches = text.tokenize(self._tokenizer, texts, self._limits, self._price)
        else:
            items = inputs["input_ids"].array.shape[0]
            batches = text.take_tokens(inputs, self._limits)
        answers: dict[str, Array] = {}
        for rows, batch in batches:
            context.check_cancelled()
            if answers:
                context.let_pass()
            for name, part in context.compute(partial(self._pass, batch)).items():
                if name not in answers:
                    answers[name] = np.empty((items, *part.shape[1:]), part.dtype)
                answers[name][rows] = part
        return answers

    def _pass(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        with torch.inference_mode():
            on_device = {name: part.to(self._device) for name, part in batch.items()}
            return self._task.run(self._call, on_device)

    def health_check(self) -> HealthReport:
        """Answer one fixed text: finite numbers, and the same as the first time."""
        self._well = False
        element = np.empty(1, object)
        element[0] = CANARY.encode()
        answer = self.infer({"text": Tensor("BYTES", element)}, InferContext())
        numbers = {
            name: part
            for name, part in answer.items()
            if isinstance(part, np.ndarray) and part.dtype == np.float32
        }
        for name, part in numbers.items():
            if not np.isfinite(part).all():
                return HealthReport(ok=False, message=f"The canary's {name} is not finite.")
            if self._canary is not None:
                first = self._canary[name]
                if np.abs(part - first).max() > CANARY_TOLERANCE * np.abs(first).max():
                    return HealthReport(ok=False, message=f"The canary's {name} has changed.")
        self._canary = self._canary or numbers
        self._well = True
        return HealthReport(ok=True, message="The canary was answered as the first time.")

    def unload(self) -> None:
        """Drop the model, and give device memory back to the driver."""
        taken, self._taken = self._taken, None
        self._model = self._call = self._tokenizer = self._canary = None
        if taken is not None and self._well:
            if self._pads_by_another:
                # As it was read: who generates with it next tells a chat template of its tokens.
                taken.tokenizer.pad_token = None
            SHELF.give_back(taken)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def measured_bytes(self) -> int:
        """Bytes of parameters and buffers; 0 before the load and after the unload."""
        return 0 if self._model is None else files.measure(self._model)

    def torch_module(self) -> Any | None:
        """Return the model, unless it is compiled."""
        return self._model if self._call is self._model else None

    def is_poisoned(self, error: BaseException) -> bool:
        """Whether CUDA reported a fault other than a lack of memory."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def warm_up(backend: TransformersBackend, context: LoadContext) -> None:
    """Have what is compiled for one item and for several be there before requests are."""
    for count in (1, 2, 3):
        context.check_cancelled()
        texts = np.empty(count, object)
        texts[:] = [CANARY.encode() * (number + 1) for number in range(count)]
        try:
            backend.infer({"text": Tensor("BYTES", texts)}, InferContext())
        except Exception as error:
            raise LoadError(f"torch could not compile the model: {error}") from error
