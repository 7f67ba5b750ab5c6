"""Low-rank adapters (peft) of a student: their making, and their merging into its weights."""

from __future__ import annotations

from typing import Any

import peft
from torch import nn

from kdcore.errors import UserError
from kdcore.specs.distill import LoraSpec

_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_READ_DIRECTLY = ["out_proj", "conv1d"]
"""Modules whose weights Mamba's kernels read without calling the module, so no adapter acts."""


def with_adapters(model: Any, lora: LoraSpec) -> Any:
    """Add adapters to a model, which alone are trained.

    Args:
        model: The model, which changes.
        lora: The adapters.

    Returns:
        The peft model around it.

    Raises:
        UserError: peft cannot adapt the targets.
    """
    unfit = _READ_DIRECTLY if model.config.model_type in _MAMBA else []
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works, its hint says int
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=unfit if lora.targets == "all-linear" and unfit else None,
        task_type="SEQ_CLS" if model.get_output_embeddings() is None else "CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as fault:
        linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        names = sorted({name.rpartition(".")[2] for name in linear} - {*unfit})
        raise UserError(
            f"student.lora.targets {lora.targets} do not fit {type(model).__name__}: "
            f"{str(fault).splitlines()[0]}",
            f"use all-linear, or names of its linear modules: {', '.join(names)}",
        ) from fault


def merged(model: Any) -> Any:
    """Merge the adapters of a model into its weights, in place.

    An adapter of tied embeddings belongs to one of the two: they are untied first, since the other
    one must not change with it.

    Args:
        model: The peft model.

    Returns:
        The plain model, which computes the same logits.
    """
    plain = model.get_base_model()
    ends = [plain.get_output_embeddings(), plain.get_input_embeddings()]
    head, embeddings = (getattr(end, "base_layer", end) for end in ends)
    adapted = any(hasattr(end, "base_layer") for end in ends)
    if adapted and head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (plain.config, plain.config.get_text_config()):
            config.tie_word_embeddings = False
    return model.merge_and_unload()
