"""The config of a model's folder, read and checked before its weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModelForCausalLM

from kdcore.errors import UserError, first_line
from kdcore.models.probes import refuse_bidirectional_config
from kdcore.specs.parts.fields import ModelSpec

T = TypeVar("T")
MULTI_LABEL = "multi_label_classification"
"""The problem type of a classifier that gives each label a probability of its own."""
MOST_LAYERS = 2_000
"""Layers of a model; the deepest that was published has 1,000."""
_CURE = "use a folder or hub id with config.json, a tokenizer and safetensors weights"


def read_config(folder: Path, spec: ModelSpec) -> Any:
    """The transformers config of a folder.

    Args:
        folder: Folder of the model.
        spec: The model.

    Returns:
        The config.

    Raises:
        UserError: The config cannot be read, is that of a sequence-to-sequence model, or has more
            layers than any model, which would take hours and all memory to build.
    """
    config = readable(
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code), spec
    )
    if config.is_encoder_decoder:
        raise UserError(
            f"{spec.model} is a sequence-to-sequence model ({config.model_type})",
            "use a decoder-only language model",
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"{spec.model} has {layers:,} layers, more than {MOST_LAYERS:,}", _CURE)
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
        reason = first_line(fault)
        if isinstance(fault, KeyError):
            reason = f"{reason} is missing"
        if "trust_remote_code" in str(fault):
            raise UserError(
                f"{spec.model} requires code from its repository, which kdcore does not run by "
                "default",
                "review that code, then set trust_remote_code: true",
            ) from fault
        if isinstance(fault, ImportError):  # such as timm, and torchvision below it
            reason = reason.partition(" You can install")[0]
            said = re.search(r"requires the (\w+) library", reason)
            named = said[1] if said else fault.name
            which = {"timm": "timm torchvision"}.get(str(named), named)  # timm imports the other
            known = f"run: pip install {which} (in a build for the installed torch)"
            cure = known if which else "install the package that is named"
        raise UserError(f"transformers cannot read {spec.model}: {reason}", cure) from fault


def refuse_unlike(config: Any, kind: Any, name: str) -> None:
    """Check that the logits of a config are those of classes.

    A language model must be causal. A classifier has a softmax, or a sigmoid for each label.

    Args:
        config: The config.
        kind: The transformers class that loads the model.
        name: Name of the model in the message.

    Raises:
        UserError: The model is bidirectional, or classifies in another way.
    """
    if kind is AutoModelForCausalLM:
        refuse_bidirectional_config(config, name)
    elif config.problem_type != MULTI_LABEL and (
        config.problem_type == "regression" or len(config.id2label) == 1
    ):
        raise UserError(
            f"{name} is a classifier for regression, and kdcore compares the probabilities of "
            "classes",
            "choose a classifier with problem_type single_label_classification or "
            "multi_label_classification",
        )


def classifies(config: Any) -> bool:
    """Whether a config names a classifier."""
    return any("Classification" in name for name in config.architectures or [])
