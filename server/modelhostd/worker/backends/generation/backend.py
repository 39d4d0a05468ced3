"""Serves causal language models with the transformers library: text generation, streamed or whole.

Names of inputs, outputs and parameters are those of Triton's backend for vLLM, so that its clients work here.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from modelhostd.core.text_memory import MAX_SEQUENCES, cache_tokens
from modelhostd.worker.backend import (
    Answer,
    Backend,
    BadInputError,
    Cancelled,
    HealthReport,
    InferContext,
    LoadContext,
    LoadError,
    Output,
    Signature,
    Tensor,
    TensorSpec,
)
from modelhostd.worker.backends import files, text
from modelhostd.worker.backends.building import build, find_device, prepare, read_config
from modelhostd.worker.backends.generation import parameters
from modelhostd.worker.backends.generation.chat import ChatTemplate
from modelhostd.worker.backends.generation.engine import Engine
from modelhostd.worker.backends.generation.generated import Generation
from modelhostd.worker.backends.generation.lanes import Lane
from modelhostd.worker.backends.generation.sampling import Sampler
from modelhostd.worker.backends.generation.text_stream import TextStream
from modelhostd.worker.backends.linear import use_onednn
from modelhostd.worker.backends.tokenizing import SHELF, Taken

MAX_SEQUENCES_MOST = 256
CACHE_TOKENS_MOST = 2**24
OPTIONS = ("max_sequences", "cache_tokens")
CANARY_TOKENS = (1, 2, 3)
CANARY_TOLERANCE = 1e-2
"""Of the canary's first scores, relative."""

_OPTIONAL = (
    TensorSpec(
        "stream", "BOOL", (1,), "send the text piece by piece (ModelStreamInfer)", optional=True
    ),
    TensorSpec(
        "sampling_parameters",
        "BYTES",
        (1,),
        "JSON object of " + ", ".join(parameters.NAMES) + "; or send them as request parameters",
        optional=True,
    ),
    TensorSpec(
        "exclude_input_in_output",
        "BOOL",
        (1,),
        "false = the whole text begins with the prompt; default true",
        optional=True,
    ),
)
_MESSAGES = TensorSpec("messages", "BYTES", (1,), "JSON list of {role, content}")


class TextGenerationBackend(Backend):
    """Task ``text-generation``. Options: ``max_sequences``, the texts that are generated at a time (16); ``cache_tokens``, the
    tokens of all of them together, and so of the longest one (16384, or a whole context of up to 32768).
    """

    tasks = frozenset({"text-generation"})
    packages = ("torch", "transformers", "safetensors", "jinja2")
    platform: ClassVar[str] = "pytorch_transformers"
    stepwise = True
    takes_state = True
    may_leave_cycles = False

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._taken: Taken | None = None
        self._engine: Engine | None = None
        self._chat: ChatTemplate | None = None
        self._defaults = parameters.Defaults()
        self._context_tokens = 0
        self._why_shorter = ""
        self._canary: torch.Tensor | None = None

    @classmethod
    def prepare(cls) -> Mapping[str, str]:
        """Import the libraries."""
        import transformers

        _ = (transformers.AutoConfig, transformers.AutoTokenizer, transformers.DynamicCache)
        _ = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return prepare()

    def load(self, context: LoadContext) -> None:
        """Load tokenizer, configuration, chat template and weights."""
        import transformers

        most, chosen = _read_options(context.options)
        files.refuse_custom_code(context.model_dir)
        config = read_config(context.model_dir)
        self._taken = SHELF.take(context.model_dir)
        self._tokenizer = self._taken.tokenizer
        self._defaults = parameters.read_defaults(
            files.read_object(context.model_dir, "generation_config.json"), config.to_dict()
        )
        limits = [
            context.max_sequence_length,
            int(getattr(config, "max_position_embeddings", 0) or 0),
        ]
        limits = [limit for limit in limits if limit > 0]
        if not limits:
            raise LoadError(
                "config.json does not say how long a text may be; set max_sequence_length"
            )
        tokens = cache_tokens(min(limits), most, chosen)
        self._context_tokens = min(*limits, tokens)
        if tokens < min(limits):
            self._why_shorter = " (backend_options.cache_tokens)"
        template = self._tokenizer.chat_template
        if isinstance(template, str):
            self._chat = ChatTemplate(template, _special_tokens(self._tokenizer))
        self._model = build(context, config, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
        self._device = find_device(context.device)
        use_onednn(self._model, self._device)
        self._engine = Engine(
            Lane(self._model, tokens, text.pass_price(self._device, context.compute_threads)),
            max_sequences=most,
            context_tokens=self._context_tokens,
            cache_tokens=tokens,
            end_tokens=self._defaults.end_tokens,
            is_fatal=self.is_poisoned,
        )

    def signature(self) -> Signature:
        """Return a prompt, or messages where the model has a chat template, in; text and counts out."""
        prompt = TensorSpec(
            "text_input",
            "BYTES",
            (1,),
            f"UTF-8 prompt, one in a request (requests share passes); or, in its place, messages: a JSON "
            f"list for the chat template. Prompt and answer together have at most {self._context_tokens} tokens",
        )
        return Signature(
            inputs=(prompt, *_OPTIONAL),
            alternatives=((_MESSAGES, *_OPTIONAL),),
            outputs=(
                TensorSpec("text_output", "BYTES", (1,), "UTF-8 text, or the next piece of it"),
                TensorSpec("finish_reason", "BYTES", (1,), "stop, length, or empty = it goes on"),
                TensorSpec("num_input_tokens", "UINT32", (1,), "tokens of the prompt"),
                TensorSpec("num_output_tokens", "UINT32", (1,), "tokens generated so far"),
            ),
            decoupled=True,
        )

    def begin(self, inputs: Mapping[str, Tensor], context: InferContext, answer: Answer) -> None:
        """Take a text."""
        assert self._engine is not None
        encoded = inputs.get("sampling_parameters")
        chosen = parameters.read(
            self._defaults.parameters,
            context.parameters,
            encoded.array[0] if encoded is not None else None,
        )
        prompt, tokens = self._read_prompt(inputs)
        stream = answer.streaming and _flag(inputs, "stream", default=False)
        own = _flag(inputs, "exclude_input_in_output", default=True)
        stops = TextStream(
            self._tokenizer, tokens, chosen.stop, skip_special=chosen.skip_special_tokens
        )
        self._engine.add(
            Generation(
                answer,
                tokens,
                chosen,
                Sampler(chosen, tokens, self._device),
                stops,
                stream=stream,
                before="" if own or stream else prompt,
            )
        )

    def step(self) -> bool:
        """Generate the next token of each text."""
        assert self._engine is not None
        return self._engine.step()

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Answer one request by itself, while nothing else is at work."""
        answer = _Collected(context)
        self.begin(inputs, context, answer)
        while answer.outputs is None:
            context.progress()
            self.step()
        return answer.outputs

    def health_check(self) -> HealthReport:
        """Score a few tokens: finite numbers, and the same as the first time."""
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        ids = torch.tensor([[token % vocabulary for token in CANARY_TOKENS]], device=self._device)
        with torch.inference_mode():
            scores = self._model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
        if not bool(torch.isfinite(scores).all()):
            return HealthReport(ok=False, message="The canary's scores are not finite.")
        if self._canary is None:
            self._canary = scores
        elif (scores - self._canary).abs().max() > CANARY_TOLERANCE * self._canary.abs().max():
            return HealthReport(ok=False, message="The canary's scores have changed.")
        return HealthReport(ok=True, message="The canary was scored as the first time.")

    def unload(self) -> None:
        """Drop the model, and give device memory back to the driver."""
        if self._chat is not None:
            self._chat.close()
        taken, self._taken = self._taken, None
        self._model = self._tokenizer = self._engine = self._chat = self._canary = None
        if taken is not None:
            SHELF.give_back(taken)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def measured_bytes(self) -> int:
        """Bytes of parameters and buffers; 0 before the load and after the unload."""
        return 0 if self._model is None else files.measure(self._model)

    def torch_module(self) -> Any | None:
        """Return the model."""
        return self._model

    def is_poisoned(self, error: BaseException) -> bool:
        """Whether CUDA reported a fault other than a lack of memory."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        return isinstance(error, RuntimeError) and "CUDA error" in str(error)

    def _read_prompt(self, inputs: Mapping[str, Tensor]) -> tuple[str, list[int]]:
        """Return the prompt and its tokens, of which at least one can follow."""
        if "messages" in inputs:
            name = "messages"
            if self._chat is None:
                raise BadInputError(name, "text_input: the model has no chat template", name)
            prompt = self._chat.render(inputs[name].array[0])
            # A template writes the special tokens itself.
            special = False
        else:
            name = "text_input"
            (prompt,) = text.decode(inputs[name].array, name)
            special = True
        most = self._context_tokens - 1
        tokens, whole = text.read_tokens(self._tokenizer, prompt, most, special=special)
        if not 0 < len(tokens) <= most:
            expected = f"1 to {most} tokens{self._why_shorter}"
            raise BadInputError(name, expected, len(tokens) if whole else f"more than {most}")
        return prompt, tokens


class _Collected(Answer):
    """Takes the one whole answer to a request."""

    streaming = False

    def __init__(self, context: InferContext) -> None:
        self._context = context
        self.outputs: Mapping[str, Output] | None = None

    @property
    def ready(self) -> bool:
        """Whether it may be sent: always."""
        return True

    @property
    def unwanted(self) -> bool:
        """Whether the caller is gone."""
        return self._context.cancelled()

    def send(self, outputs: Mapping[str, Output], *, last: bool) -> None:
        """Keep the answer."""
        self.outputs = outputs

    def fail(self, error: BaseException) -> None:
        """Raise the error to who steps."""
        raise Cancelled if isinstance(error, Cancelled) else error


def _read_options(options: Mapping[str, Any]) -> tuple[int, int]:
    """Return the most texts at a time, and their tokens; 0 = not said."""
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise BadInputError("backend_options", ", ".join(OPTIONS), min(unknown))
    most = _read_count(options, "max_sequences", MAX_SEQUENCES_MOST)
    return most or MAX_SEQUENCES, _read_count(options, "cache_tokens", CACHE_TOKENS_MOST)


def _read_count(options: Mapping[str, Any], name: str, most: int) -> int:
    if name not in options:
        return 0
    value = options[name]
    # On the wire all numbers are doubles.
    a_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not a_number or not 0 < value <= most or value != int(value):
        raise BadInputError(name, f"1 to {most}", value)
    return int(value)


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    return {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }


def _flag(inputs: Mapping[str, Tensor], name: str, *, default: bool) -> bool:
    tensor = inputs.get(name)
    return default if tensor is None else bool(np.asarray(tensor.array).reshape(-1)[0])
