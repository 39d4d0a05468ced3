"""From the Hub's many words for what a model does to the task that a backend serves.

The Hub's words: https://huggingface.co/docs/hub/models-tasks. all-MiniLM-L6-v2 says
``sentence-similarity`` and is served as ``feature-extraction``; words nobody serves become ``other``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

OTHER = "other"

TASKS = frozenset(
    {
        "any-to-any", "audio-classification", "audio-text-to-text", "audio-to-audio",
        "automatic-speech-recognition", "depth-estimation", "document-question-answering",
        "feature-extraction", "fill-mask", "image-classification", "image-feature-extraction",
        "image-segmentation", "image-text-to-text", "image-to-image", "image-to-text", "image-to-video",
        "keypoint-detection", "mask-generation", "object-detection", "question-answering",
        "summarization", "table-question-answering", "text-classification", "text-generation",
        "text-to-audio", "text-to-image", "text-to-speech", "text-to-video", "token-classification",
        "translation", "video-classification", "visual-question-answering", "zero-shot-classification",
        "zero-shot-image-classification", "zero-shot-object-detection",
    }
)  # fmt: skip
"""The tasks modelhost speaks of, in the words of ``pipeline_tag``; ``other`` stands for the rest."""

BACKEND_TASKS = {
    "transformers": frozenset({"feature-extraction", "text-classification"}),
    "text-generation": frozenset({"text-generation"}),
    "identity": frozenset({"*"}),
}
"""The tasks of modelhost's own backends (``*`` = any), for a daemon that must not import them."""

BACKEND_PACKAGES = {
    "transformers": ("torch", "transformers", "safetensors"),
    "text-generation": ("torch", "transformers", "safetensors", "jinja2"),
}
"""What must be installed for them, as they say themselves."""

ONLY_NAMED = frozenset({"identity"})
"""Backends that serve only models whose config names them."""

ALIASES = {
    "sentence-similarity": "feature-extraction",
    "text-embedding": "feature-extraction",
    "embeddings": "feature-extraction",
    "sentence-transformers": "feature-extraction",
    "sentiment-analysis": "text-classification",
    "text-ranking": "text-classification",
    "text-pair-classification": "text-classification",
    "ner": "token-classification",
    "conversational": "text-generation",
    "text2text-generation": "text-generation",
    "chat": "text-generation",
    "image-captioning": "image-to-text",
    "visual-question-answering-vqa": "visual-question-answering",
    "speech-recognition": "automatic-speech-recognition",
    "asr": "automatic-speech-recognition",
    "tts": "text-to-speech",
    "unconditional-image-generation": "text-to-image",
    "zero-shot-text-classification": "zero-shot-classification",
}

_CLASSES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "Model": "feature-extraction",
}
"""How the names of the transformers library's classes end, and what models of such a class do; the first that fits counts."""


def task_of(pipeline_tag: str, tags: Sequence[str] = ()) -> str:
    """Return the task for a Hub ``pipeline_tag``; where that is empty, for the first telling tag.

    Unknown words give ``other``: never an error, since a source may say anything.
    """
    for word in (pipeline_tag, *(tags if not pipeline_tag else ())):
        task = word.strip().lower().replace("_", "-")
        task = ALIASES.get(task, task)
        if task in TASKS:
            return task
    return OTHER


def task_told(pipeline_tag: str, tags: Sequence[str], config_task: str) -> str:
    """Return the task in the source's words; where it has none, that of the files' ``config.json``, if that tells one."""
    told = task_of(pipeline_tag, tags)
    return (config_task or told) if told == OTHER and not pipeline_tag else told


def task_of_config(config: Mapping[str, Any]) -> str:
    """Return the task that a ``config.json`` tells by the class it was saved from; empty = it does not.

    For sources that say nothing of it, as folders, plain URLs and uploads.
    """
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    if not isinstance(first, str) or "vocab_size" not in config:
        return ""
    return next((task for end, task in _CLASSES.items() if first.endswith(end)), "")
