"""The config of a model's folder, read and checked before its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModelForCausalLM

from kdcore.errors import UserError
from kdcore.models.probes import refuse_bidirectional_config
from kdcore.specs.fields import ModelSpec

T = TypeVar("T")
_OTHER_LOSSES = ("multi_label_classification", "regression")
"""Problem types of classifiers whose loss is not that of a softmax."""
_CURE = "use a folder or hub id with config.json, a tokenizer and safetensors weights"


def read_config(folder: Path, spec: ModelSpec) -> Any:
    """The transformers config of a folder.

    Args:
        folder: Folder of the model.
        spec: The model.

    Returns:
        The config.

    Raises:
        UserError: The config cannot be read, or is that of a sequence-to-sequence model.
    """
    config = readable(
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code), spec
    )
    if config.is_encoder_decoder:
        raise UserError(
            f"{spec.model} is a sequence-to-sequence model ({config.model_type})",
            "use a decoder-only language model",
        )
    return config


def readable(read: Callable[[], T], spec: ModelSpec, cure: str = _CURE) -> T:
    """The result of a transformers reader; its error becomes a one-line UserError.

    Args:
        read: The reader.
        spec: The model, which the message names.
        cure: Cure in the message.

    Returns:
        What the reader returns.

    Raises:
        UserError: The reader fails.
    """
    try:
        return read()
    except (MemoryError, UserError):
        raise
    except Exception as fault:  # a damaged or hostile file makes the reader fail in many ways
        if type(fault).__name__ == "OutOfMemoryError":
            raise
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        if "trust_remote_code" in str(fault):
            raise UserError(
                f"{spec.model} requires code from its repository, which kdcore does not run by "
                "default",
                "review that code, then set trust_remote_code: true",
            ) from fault
        raise UserError(f"transformers cannot read {spec.model}: {reason}", cure) from fault


def refuse_unlike(config: Any, kind: Any, name: str) -> None:
    """Check that the logits of a config are those of one class among several.

    A language model must be causal, and the loss of a classifier is that of a softmax.

    Args:
        config: The config.
        kind: The transformers class that loads the model.
        name: Name of the model in the message.

    Raises:
        UserError: The model is bidirectional, or classifies in another way.
    """
    if kind is AutoModelForCausalLM:
        refuse_bidirectional_config(config, name)
    elif config.problem_type in _OTHER_LOSSES or len(config.id2label) == 1:
        what = config.problem_type or "regression"
        raise UserError(
            f"{name} is a classifier for {what.replace('_', ' ')}, and kdcore supports only "
            "classifiers that choose one of several labels",
            "choose a classifier with problem_type single_label_classification",
        )


def classifies(config: Any) -> bool:
    """Whether a config names a classifier."""
    return any("Classification" in name for name in config.architectures or [])
