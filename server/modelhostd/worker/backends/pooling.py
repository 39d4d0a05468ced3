"""How token embeddings become one sentence embedding, as a model's own files say it.

The layout is that of sentence-transformers (https://sbert.net): ``modules.json`` lists the steps, the pooling
step has a ``config.json``. A model without that layout is pooled by the mean, which is what most
were trained for.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from modelhostd.core.values import dataclass
from modelhostd.worker.backend import BadInputError, UnsupportedModelError
from modelhostd.worker.backends.files import read_json, read_object

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done with a text before and after the transformer."""

    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int = 0
    """Tokens after which a text is cut; 0 = the files do not say."""
    lower_case: bool = False
    prompt: str = ""
    """Text put before each text."""


def read_recipe(model_dir: Path, options: Mapping[str, object]) -> Recipe:
    """Return what a model's files say, with ``pooling`` and ``normalize`` of ``options`` over it."""
    recipe = _from_modules(model_dir)
    pooling = options.get("pooling", "")
    normalize = options.get("normalize", recipe.normalize)
    if pooling and pooling not in POOLS:
        raise BadInputError("pooling", " or ".join(POOLS), pooling)
    if not isinstance(normalize, bool):
        raise BadInputError("normalize", "true or false", normalize)
    return Recipe(
        (str(pooling),) if pooling else recipe.pooling,
        normalize,
        recipe.max_tokens,
        recipe.lower_case,
        recipe.prompt,
    )


def _from_modules(model_dir: Path) -> Recipe:
    modules = read_json(model_dir, "modules.json")
    if modules is None:
        return Recipe()
    pooling: tuple[str, ...] = ("mean",)
    normalize = False
    transformer = ""
    for module in modules if isinstance(modules, list) else ():
        full_name = str(module.get("type", ""))
        name = full_name.rpartition(".")[2]
        path = str(module.get("path", ""))
        if not full_name.startswith("sentence_transformers."):
            raise UnsupportedModelError(
                f"modules.json names '{full_name}': the model needs Python code of its own, which is "
                "never run"
            )
        if name == "Pooling":
            pooling = _read_pooling(model_dir, path)
        elif name == "Normalize":
            normalize = True
        elif name == "Transformer":
            transformer = path
        else:
            raise UnsupportedModelError(
                f"modules.json has a step '{name}'; Transformer, Pooling and Normalize are supported"
            )
    if transformer:
        raise UnsupportedModelError(f"the transformer lies in '{transformer}', not at the top")
    settings = read_object(model_dir, "sentence_bert_config.json")
    return Recipe(
        pooling,
        normalize,
        int(settings.get("max_seq_length") or 0),
        bool(settings.get("do_lower_case")),
        _read_prompt(model_dir),
    )


def _read_pooling(model_dir: Path, path: str) -> tuple[str, ...]:
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise UnsupportedModelError(f"modules.json names '{path}', which is outside the model")
    settings = read_object(model_dir, f"{path}/config.json" if path else "config.json")
    mode = settings.get("pooling_mode")
    modes = mode if isinstance(mode, list) else [mode] if mode else []
    chosen = tuple(str(name) for name in modes) or tuple(
        name for name, key in _KEYS.items() if settings.get(key)
    )
    if not chosen:
        raise UnsupportedModelError(
            f"modules.json names the pooling in '{path}', whose config.json is absent or names none; "
            "fetch or upload it with the model"
        )
    unknown = [name for name in chosen if name not in POOLS]
    if unknown:
        raise UnsupportedModelError(
            f"pooling '{', '.join(unknown)}' is not one of {', '.join(POOLS)}"
        )
    return chosen


def _read_prompt(model_dir: Path) -> str:
    settings = read_object(model_dir, "config_sentence_transformers.json")
    prompts = settings.get("prompts")
    name = settings.get("default_prompt_name")
    return str(prompts.get(name, "")) if name and isinstance(prompts, dict) else ""


def _mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def _mean_sqrt_len(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9).sqrt()


def _weighted_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Weights 1, 2, 3 ... by position: https://arxiv.org/abs/2202.08904
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=tokens.dtype)
    return _mean(tokens, mask * positions.unsqueeze(-1))


def _max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(mask == 0, -1e9).max(1).values


def _first(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # The first token that is not padding: some tokenizers pad at the left.
    return tokens[torch.arange(len(tokens)), mask.squeeze(-1).argmax(1)]


def _last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    last = tokens.shape[1] - 1 - mask.squeeze(-1).flip(1).argmax(1)
    return tokens[torch.arange(len(tokens)), last]


POOLS: Mapping[str, Pool] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def pool(recipe: Recipe, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return FP32 embeddings ``[n, dim]`` of token embeddings ``[n, length, dim]``.

    Several ways of pooling are put side by side, in the order in which sentence-transformers does.
    """
    tokens = tokens.float()
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    pooled = torch.cat([POOLS[name](tokens, mask) for name in recipe.pooling], 1)
    return torch.nn.functional.normalize(pooled, p=2, dim=1) if recipe.normalize else pooled
