"""Builds a model of the transformers library from weights that are read here, in its precision.

The library would map the files, cannot tell how far it is, and cannot be cancelled.
"""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from modelhostd.worker import failures
from modelhostd.worker.backend import BadInputError, LoadContext, LoadError, UnsupportedModelError
from modelhostd.worker.backends import files
from modelhostd.worker.image import devices
from modelhostd.worker.process import importing

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_BUILD = threading.Lock()
"""While the library builds a model it changes torch's default dtype and initialisers for all threads."""


def prepare() -> Mapping[str, str]:
    """Have the libraries be quiet and use the cores that there are; return their versions."""
    import transformers

    quiet: Any = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def read_config(model_dir: Path) -> Any:
    """Return the configuration of a model. Raises what the library raises."""
    import transformers

    # Some import a thousand modules. The collector would look at all of these twice: 36 ms and 70 ms of CPU, in which nothing else runs.
    return importing(
        lambda: transformers.AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    )


def build(
    context: LoadContext,
    config: Any,
    mapping: Mapping[Any, Any],
    *,
    may_lack: Callable[[str], bool] = lambda parameter: False,
) -> Any:
    """Return the model that ``mapping`` (configuration class to model class) names, ready to be used.

    Raises :class:`LoadError` where the files lack a weight, except those that ``may_lack`` lets pass, and MODEL_NOT_LOADED
    where an image that stayed cannot be taken in place of the files.
    """
    precision = context.precision
    if precision and precision not in PRECISIONS:
        raise BadInputError("precision", " or ".join(PRECISIONS), precision)
    kind = importing(lambda: _model_class(mapping, config))
    weights = files.read_weights(context, PRECISIONS.get(precision))
    floats = (tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    dtype = PRECISIONS.get(precision) or next(floats, torch.float32)
    with _BUILD:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            # Listed with the others below; the library's own error says only that there is one.
            ignore_mismatched_sizes=True,
        )
    missing = [name for name in sorted(info["missing_keys"]) if not may_lack(name)]
    wrong = [str(entry[0]) for entry in info["mismatched_keys"]]
    if missing or wrong:
        named = ", ".join((missing + wrong)[:3])
        raise LoadError(
            f"the files lack {len(missing)} of the weights and have {len(wrong)} of another "
            f"shape ({named}): they are not of a model for task '{context.task}'"
        )
    if context.kept is not None and not context.kept.suit(model):
        raise failures.not_adopted(context.model)
    context.check_cancelled()
    model.requires_grad_(False)
    # Left in RAM, its parameters views of what was read: the worker puts it on its device.
    return model.eval()


def compiled(model: Any) -> Any:
    """Return what torch compiles of a model when it is first called with inputs of a kind."""
    import torch._inductor.config as inductor

    # Here, in the thread that loads: not in processes that would outlive it.
    inductor.compile_threads = 1
    return torch.compile(model, dynamic=True)


def find_device(device: str) -> torch.device:
    """Return torch's device for the id of a device. Raises :class:`LoadError` where torch cannot use it."""
    found = devices.find_device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"torch {torch.__version__} finds no CUDA for devices/{device}")
    return found


def _model_class(mapping: Mapping[Any, Any], config: Any) -> Any:
    try:
        kind = mapping[type(config)]
    except KeyError:
        raise UnsupportedModelError(
            f"models of type '{config.model_type}' cannot do this task"
        ) from None
    if isinstance(kind, tuple):
        named = set(config.architectures or ())
        return next((option for option in kind if option.__name__ in named), kind[0])
    return kind
