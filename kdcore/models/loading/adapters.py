"""Low-rank adapters (peft) of a student: their making, and their merging into its weights.

peft is imported where it is used: with the libraries of quantisation, it takes a second to load.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kdcore.errors import UserError, first_line
from kdcore.models.folder.files import ADAPTER
from kdcore.models.folder.quantization import in_full
from kdcore.models.folder.shapes import unlike
from kdcore.models.loading.loaded import first_few
from kdcore.specs.distill import LoraSpec
from kdcore.specs.parts.fields import ModelSpec

_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_OUTER = "base_model.model."
"""How peft names the model in the weights of an adapter."""
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
    import peft

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
            f"{first_line(fault)}",
            f"use all-linear, or names of its linear modules: {', '.join(names)}",
            "student.lora.targets",
        ) from fault


def with_saved_adapter(model: Any, folder: Path, spec: ModelSpec) -> Any:
    """Load a trained adapter into a model: into its weights, or beside them if it is quantised.

    Args:
        model: The model, which changes.
        folder: Folder of the adapter, see `kdcore.models.folder.files.adapter_folder`.
        spec: The model's spec, for the message.

    Returns:
        The model, of its own class.

    Raises:
        UserError: The adapter does not fit the model.
    """
    import peft

    try:
        if getattr(model, "hf_quantizer", None) is not None:
            model.load_adapter(folder)
            return model
        adapted: Any = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        # it drops what its config does not name; only a second call says what
        result = adapted.load_adapter(folder, "default", autocast_adapter_dtype=False)
        if result.unexpected_keys or result.missing_keys:
            which = "does not make" if result.unexpected_keys else "makes, and it lacks,"
            names = result.unexpected_keys or result.missing_keys
            raise ValueError(f"{ADAPTER[0]} {which} {first_few(sorted(names))}")
        return merged(adapted)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        why = _other_shape(model, folder) or first_line(fault)
        raise UserError(
            f"the adapter {spec.adapter} does not fit {spec.model}: {why}",
            "use the model that the adapter was trained on (base_model_name_or_path in its "
            "adapter_config.json)",
        ) from fault


def _other_shape(model: Any, folder: Path) -> str | None:
    """The weight of a saved adapter whose shape differs from what peft has added to a model."""
    config, weights = (folder / name for name in ADAPTER)
    with safe_open(weights, framework="pt") as opened:
        names = opened.keys()
        stored = {n.removeprefix(_OUTER): opened.get_slice(n).get_shape() for n in names}
    made = {n.replace(".default", ""): each.shape for n, each in model.state_dict().items()}
    return unlike(stored, made, json.loads(config.read_text("utf-8")), config.name)


def merged(model: Any) -> Any:
    """Merge the adapters of a model into its weights, in place.

    Quantised weights are restored to full precision first: a sum that is quantised again would be
    another model.

    An adapter of tied embeddings belongs to one of the two: they are untied first, since the other
    one must not change with it.

    Args:
        model: The peft model.

    Returns:
        The plain model, which computes the same logits.
    """
    if getattr(model.get_base_model(), "hf_quantizer", None) is not None:
        model = _on_full_weights(model)
    plain = model.get_base_model()
    if ties_its_ends(plain):
        ends = plain.get_output_embeddings(), plain.get_input_embeddings()
        if any(hasattr(end, "base_layer") for end in ends):
            untie(plain)
    return model.merge_and_unload()


def merged_with(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Merge the adapters of a model that is in pieces, whose weights were gathered.

    Args:
        model: The peft model, which stays as it is.
        weights: Its whole weights by name, on the CPU.

    Returns:
        The plain model on the CPU.
    """
    import peft

    plain = model.get_base_model()
    with torch.device("meta"):
        outline = type(plain)._from_config(copy.deepcopy(plain.config))
        again: Any = peft.get_peft_model(outline, copy.deepcopy(model.peft_config["default"]))
    again.load_state_dict(weights, assign=True)
    if ties_its_ends(plain):
        head = _below(outline.get_output_embeddings())
        head.weight = _below(outline.get_input_embeddings()).weight
    return merged(again)


def ties_its_ends(model: Any) -> bool:
    """Whether head and embeddings of a model share their weights, perhaps below adapters."""
    head = _below(model.get_output_embeddings())  # a model without one may have no embeddings
    return head is not None and head.weight is _below(model.get_input_embeddings()).weight


def untie(model: Any) -> None:
    """Give the head of a model, which it shares with the embeddings, weights of its own."""
    head = _below(model.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _below(end: Any) -> Any:
    """The head or the embeddings below an adapter, if there is one."""
    return getattr(end, "base_layer", end)


def _on_full_weights(model: Any) -> Any:
    """The same adapters around the same model, whose quantised weights are in full."""
    import peft

    config, state = model.peft_config["default"], peft.get_peft_model_state_dict(model)
    adapted = peft.get_peft_model(in_full(model.unload()), config)
    peft.set_peft_model_state_dict(adapted, state)
    return adapted
