"""Which files of a source are fetched: the model's patterns, or a choice that loads and is safe.

Of ``config.json model.safetensors model.fp16.safetensors pytorch_model.bin onnx/model.onnx`` the
choice is ``config.json model.safetensors``.

Every file left out carries a sentence why. Pickles and code are never chosen, patterns or not, unless
the operator allowed unsafe files for the model.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.paths import check_tree, path_fault, printable
from modelhostd.core.values import dataclass

_WHY_PICKLE = "a pickle can run code when it is loaded"

PATTERNS_MAX = 64
PATTERN_CHARS_MAX = 256

CODE_SUFFIXES = frozenset(
    {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1", ".js", ".jar"}
)
# `.bin` is mostly a pickle (pytorch_model.bin); where it is not, safetensors say the same.
PICKLE_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".pt2", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".mar", ".nemo"}
)
_OTHER_FRAMEWORKS = {
    ".onnx": "ONNX", ".onnx_data": "ONNX", ".ort": "ONNX", ".h5": "TensorFlow", ".tflite": "TensorFlow",
    ".pb": "TensorFlow", ".msgpack": "Flax", ".mlmodel": "Core ML", ".ot": "rust-bert",
    ".engine": "TensorRT", ".plan": "TensorRT", ".npz": "NumPy", ".keras": "Keras",
}  # fmt: skip
_OTHER_FOLDERS = {"onnx": "ONNX", "openvino": "OpenVINO", "coreml": "Core ML", "tf": "TensorFlow"}
_KEPT_SUFFIXES = frozenset(
    {
        ".safetensors", ".gguf", ".json", ".txt", ".model", ".jinja", ".jinja2", ".md", ".vocab",
        ".merges", ".tiktoken", ".spm", ".bpe", ".yaml", ".yml", ".toml", ".dict", ".codes",
    }
)  # fmt: skip
_KEPT_NAMES = re.compile(
    r"(licen[cs]e|notice|copying|use_policy|acceptable_use_policy)([._-].*)?", re.IGNORECASE
)
_TRAINING = re.compile(
    r"(^|/)(optimizer[^/]*|rng_state[^/]*|trainer_state\.json|training_args[^/]*|scheduler\.pt"
    r"|scaler\.pt|[^/]*tfevents[^/]*|(runs|wandb|logs|checkpoint-\d+|global_step\d+)/.*)$",
    re.IGNORECASE,
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_VARIANT = re.compile(
    r"^(?P<base>.+?)[._-](?P<variant>fp16|bf16|fp32|fp8|int8|non_ema|ema|fp16_non_ema|8bit|4bit)$"
)
_INDEX = re.compile(
    r"(?P<stem>.+)(?P<suffix>\.(bin|safetensors))\.index(?P<variant>\.[a-z0-9_]+)?\.json"
)
_GGUF_ORDER = ("q4_k_m", "q5_k_m", "q4_0", "q8_0", "f16", "bf16", "f32")


@dataclass(frozen=True, slots=True)
class Selection:
    """What would be fetched, in the source's order, and (path, why) of everything else."""

    chosen: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def select(
    paths: Sequence[str],
    allow_patterns: Sequence[str] = (),
    ignore_patterns: Sequence[str] = (),
    *,
    allow_unsafe: bool = False,
    source: str = "",
) -> Selection:
    """Choose among the ``paths`` of a source.

    With allow patterns exactly the matching safe files are chosen; without, the default choice:
    safetensors, what goes with them, one precision variant. Patterns are those of a shell on the whole
    path (``*`` also matches ``/``); one that ends with ``/`` means everything below.

    Raises UNSAFE_FILE when only unsafe weights or names are left, SOURCE_NOT_FOUND when nothing
    matches, UNSUPPORTED_MODEL when the weights are of another framework only, INVALID_ARGUMENT for a
    pattern out of bounds.
    """
    allow = _patterns("allow_patterns", allow_patterns)
    ignore = _patterns("ignore_patterns", ignore_patterns)
    why: dict[str, str] = {}
    for path in paths:
        if any(fnmatchcase(path, pattern) for pattern in ignore):
            why[path] = "matches an ignore pattern"
        elif allow and not any(fnmatchcase(path, pattern) for pattern in allow):
            why[path] = "matches no allow pattern"
        elif ((reason := unsafe_suffix(path)) and not allow_unsafe) or (
            not allow and (reason := _unneeded(path, allow_unsafe=allow_unsafe))
        ):
            why[path] = reason
    left = [path for path in paths if path not in why]
    if not allow:
        for rule in _RULES:
            why.update(rule(left))
            left = [path for path in left if path not in why]
        if allow_unsafe and _weights(left, (".safetensors",)):
            why.update((p, "the safetensors say the same") for p in left if _pickle(p))
        why.update((p, "names the shards of files left out") for p in _orphan_indexes(left))
        left = [path for path in left if path not in why]
    _check_rest(paths, left, why, source)
    check_tree(left, source)
    return Selection(tuple(left), tuple((printable_or_plain(p), why[p]) for p in paths if p in why))


def printable_or_plain(path: str) -> str:
    """Return a path as it is when it is a harmless name, else quoted and escaped."""
    return printable(path) if path_fault(path) else path


def _patterns(field: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if len(patterns) > PATTERNS_MAX:
        raise invalid(f"source.{field}", f"at most {PATTERNS_MAX} patterns", len(patterns))
    for pattern in patterns:
        if not 0 < len(pattern) <= PATTERN_CHARS_MAX or "\0" in pattern:
            raise invalid(
                f"source.{field}", f"patterns of 1 to {PATTERN_CHARS_MAX} characters", pattern
            )
    return tuple(p + "*" if p.endswith("/") else p for p in patterns)


def _suffix(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return name[name.rfind(".") :].lower() if "." in name[1:] else ""


def _pickle(path: str) -> bool:
    return _suffix(path) in PICKLE_SUFFIXES


def unsafe_suffix(path: str) -> str:
    """Return why a file of this name is taken for one that can run code; empty where it is not."""
    suffix = _suffix(path)
    if suffix in CODE_SUFFIXES:
        return "code is never fetched"
    if suffix in PICKLE_SUFFIXES:
        return _WHY_PICKLE
    return ""


def _unneeded(path: str, *, allow_unsafe: bool) -> str:
    folders, _, name = path.rpartition("/")
    if _TRAINING.search(path):
        return "left over from training"
    suffix = _suffix(path)
    framework = _OTHER_FRAMEWORKS.get(suffix) or next(
        (_OTHER_FOLDERS[f] for f in folders.lower().split("/") if f in _OTHER_FOLDERS), ""
    )
    if not framework and (name.startswith("openvino") or ".mlpackage/" in path):
        framework = "OpenVINO" if name.startswith("openvino") else "Core ML"
    if framework:
        return f"a copy for {framework}"
    if name.startswith(".git"):
        return "housekeeping of the repository"
    unsafe_wanted = allow_unsafe and suffix in PICKLE_SUFFIXES
    if suffix in _KEPT_SUFFIXES or _KEPT_NAMES.fullmatch(name) or unsafe_wanted:
        return ""
    return "not needed to load the model"


def _stem(path: str) -> str:
    """``unet/model.fp16-00001-of-00002.safetensors`` -> ``unet/model.fp16``."""
    return _SHARD.sub("", path[: len(path) - len(_suffix(path))])


def _weights(paths: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    return [path for path in paths if _suffix(path) in suffixes]


def _original_layout(paths: Sequence[str]) -> dict[str, str]:
    tensors = _weights(paths, (".safetensors",))
    original = [
        p
        for p in tensors
        if p.startswith("original/") or re.match(r"consolidated\b", p) is not None
    ]
    if len(original) == len(tensors):
        return {}
    folder = [p for p in paths if p.startswith("original/")]
    return dict.fromkeys([*original, *folder], "a copy in the authors' own layout")


def _single_file_pipeline(paths: Sequence[str]) -> dict[str, str]:
    tensors = _weights(paths, (".safetensors",))
    if "model_index.json" not in paths or all("/" not in path for path in tensors):
        return {}
    return dict.fromkeys(
        [path for path in tensors if "/" not in path], "a copy of the pipeline in one file"
    )


def _one_variant(paths: Sequence[str]) -> dict[str, str]:
    """Of ``model`` and ``model.fp16`` keep the plain one; of variants only, the first of the table."""
    order = ("", "bf16", "fp16", "fp32")
    groups: dict[str, dict[str, list[str]]] = {}
    for path in _weights(paths, (".safetensors",)):
        stem = _stem(path)
        folder, _, name = stem.rpartition("/")
        match = _VARIANT.match(name)
        base = f"{folder}/{match['base']}" if match else f"{folder}/{name}"
        groups.setdefault(base, {}).setdefault(match["variant"] if match else "", []).append(path)
    out: dict[str, str] = {}
    for variants in groups.values():
        best = min(variants, key=lambda v: (order.index(v) if v in order else len(order), v))
        for variant, members in variants.items():
            if variant != best:
                kept = best or "plain"
                out.update(dict.fromkeys(members, f"one precision is enough: {kept} is chosen"))
    return out


def _one_layout(paths: Sequence[str]) -> dict[str, str]:
    """Of ``model.safetensors`` and its shards keep the single file: loaders look for it first."""
    tensors = _weights(paths, (".safetensors",))
    single = {path for path in tensors if not _SHARD.search(path[: -len(".safetensors")])}
    return {
        path: "a copy in shards"
        for path in tensors
        if path not in single and _stem(path) + ".safetensors" in single
    }


def _one_gguf(paths: Sequence[str]) -> dict[str, str]:
    ggufs = _weights(paths, (".gguf",))
    if _weights(paths, (".safetensors",)):
        return dict.fromkeys(ggufs, "a quantised copy; the safetensors are chosen")
    stems = sorted({_stem(path) for path in ggufs if "mmproj" not in path.lower()})
    if len(stems) < 2:
        return {}

    def rank(stem: str) -> tuple[int, str]:
        for place, name in enumerate(_GGUF_ORDER):
            if stem.lower().endswith(name):
                return place, stem
        return len(_GGUF_ORDER), stem

    best = min(stems, key=rank)
    return {
        path: f"one precision is enough: {best.rsplit('/', 1)[-1]} is chosen"
        for path in ggufs
        if _stem(path) != best and "mmproj" not in path.lower()
    }


# Each takes what is left and returns what to leave out of it, and why; in this order.
_RULES: tuple[Callable[[Sequence[str]], dict[str, str]], ...] = (
    _original_layout,
    _single_file_pipeline,
    _one_variant,
    _one_layout,
    _one_gguf,
)


def _orphan_indexes(left: Sequence[str]) -> list[str]:
    """``pytorch_model.bin.index.json`` and ``model.safetensors.index.json`` without their shards."""
    suffixes = (".bin", ".safetensors")
    shards = {
        (_stem(path), _suffix(path))
        for path in _weights(left, suffixes)
        if _SHARD.search(path[: -len(_suffix(path))])
    }
    return [
        path
        for path in left
        if (match := _INDEX.fullmatch(path)) is not None
        and (match["stem"] + (match["variant"] or ""), match["suffix"]) not in shards
    ]


def _check_rest(
    paths: Sequence[str], left: Sequence[str], why: dict[str, str], source: str
) -> None:
    if _weights(left, (".safetensors", ".gguf", *PICKLE_SUFFIXES)):
        return
    shown = f"{source or 'the source'} has"
    pickles = [path for path in paths if why.get(path) == _WHY_PICKLE]
    if pickles:
        raise ModelhostError(
            Reason.UNSAFE_FILE,
            f"{shown} its weights as pickles only ({printable_or_plain(pickles[0])}"
            f"{f' and {len(pickles) - 1} more' if len(pickles) > 1 else ''}), and a pickle can run code "
            "when it is loaded; use a revision or repository with safetensors, or, if you trust it, "
            "allow_unsafe (`modelhost pull --allow-unsafe`, operators)",
            {"source": source, "file": printable_or_plain(pickles[0]), "cause": "pickle"},
        )
    foreign = [path for path in paths if why.get(path, "").startswith("a copy for ")]
    if foreign:
        framework = why[foreign[0]].removeprefix("a copy for ")
        raise ModelhostError(
            Reason.UNSUPPORTED_MODEL,
            f"{shown} weights for {framework} only ({printable_or_plain(foreign[0])}); "
            "use a repository with safetensors",
            {"cause": f"weights for {framework} only"},
        )
    if not left:
        raise ModelhostError(
            Reason.SOURCE_NOT_FOUND,
            f"{shown} {len(paths)} files, and none of them is one to fetch; InspectSource says why",
            {"source": source, "missing": "files"},
        )
