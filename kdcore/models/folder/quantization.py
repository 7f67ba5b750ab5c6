"""Quantised models: the config that quantises them, their memory, and their weights in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)

from kdcore.components.optional_packages import optional_package
from kdcore.errors import UserError, in_field, nearest
from kdcore.models.folder.config import read_config, readable
from kdcore.models.folder.files import model_folder
from kdcore.models.folder.weights import weight_files
from kdcore.specs.distill import StudentSpec
from kdcore.specs.parts.fields import ModelSpec

_RESTORED = ("bitsandbytes", "hqq", "torchao")
"""Methods whose weights `in_full` restores, so that a student's adapters can be merged."""
_PACKAGES = ("bitsandbytes", "torchao")
_CURE = (
    "install the package that the reason names, use a device that it supports, or load a model "
    "without quantisation"
)


def quantization_config(spec: ModelSpec, config: Any) -> Any:
    """The transformers config that quantises a model while it is loaded.

    Args:
        spec: The model.
        config: The config of its folder.

    Returns:
        The config of the quantisation; None for a model that is loaded as its files are.

    Raises:
        UserError: ``spec.quantization`` is not a config of transformers or requires a package that
            is not installed, or the files are quantised already.
    """
    stored = method_of(config)
    if spec.quantization is None:
        return None
    if stored is not None:
        raise UserError(
            f"the weights of {spec.model} are quantised already ({stored})",
            "remove quantization: such a model is loaded as it is",
        )
    asked = dict(spec.quantization)
    bits = next((f"_{n}bit" for n in (4, 8) if asked.get(f"load_in_{n}bit")), "")
    method = "bitsandbytes" + bits if bits else asked.get("quant_method")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = {name.partition("_")[0] for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
        if method == "bitsandbytes":
            raise UserError(
                "quantization has quant_method bitsandbytes, but does not say how many bits",
                "add load_in_4bit: true or load_in_8bit: true",
            )
        raise UserError(
            f"quantization.quant_method {method!r} is unknown to transformers",
            nearest(str(method), known),
        )
    refuse_without_package(str(method))
    kind: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    return readable(
        lambda: AutoQuantizationConfig.from_dict(asked),
        spec,
        f"install the package that it needs, and use the fields of transformers.{kind.__name__}",
    )


def refuse_without_package(method: str) -> None:
    """Raises UserError when a quantisation requires a package of kdcore's extra that is absent."""
    for package in _PACKAGES:
        if method.startswith(package):
            optional_package(package, "kdcore[quantized]", f"the quantisation {package}")


def method_of(config: Any) -> str | None:
    """The quantisation of a folder's weights, e.g. gptq; None for weights in full."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    fields = found if isinstance(found, dict) else found.to_dict()
    return str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))


def refuse_quantized_training(
    spec: StudentSpec, teacher: ModelSpec | None, *, sharded: bool = False
) -> None:
    """Check, before anything is loaded, that a quantised student can be trained and saved.

    Args:
        spec: The student.
        teacher: The teacher, which the student may be a copy of.
        sharded: Whether FSDP shards the student.

    Raises:
        UserError: All weights of a quantised model would be trained or sharded, or its adapters
            could not be merged.
    """
    named = teacher if spec.model == "teacher" else spec
    if named is None or spec.model == "new":
        return
    with in_field("teacher" if spec.model == "teacher" else "student"):
        config = read_config(model_folder(named, weights=False), named)
        asked = quantization_config(named, config)
    method = method_of(config) if asked is None else str(asked.quant_method.value)
    if method is None:
        return
    if spec.lora is None:
        raise UserError(
            f"the weights of {named.model} are quantised ({method}), and quantised weights cannot "
            "be trained",
            "train adapters on them (student.lora), or set student.model to the model in full "
            "precision",
        )
    if sharded:
        raise UserError(
            f"FSDP does not shard the quantised weights of {named.model} ({method})",
            "set student.model to the model in full precision, or remove training.trainer.fsdp",
        )
    if method not in _RESTORED or spec.model == "teacher":
        raise UserError(
            f"adapters on {named.model} cannot be merged into its quantised weights ({method}) "
            "when the student is saved",
            "set student.model to the model in full precision, with student.quantization: "
            "{quant_method: bitsandbytes, load_in_4bit: true}",
        )


def outline_bytes(model: Any, asked: Any, folder: Path) -> int | None:
    """The memory of quantised weights, by the model's outline.

    Args:
        model: The model on the meta device; its linear layers become quantised ones.
        asked: See `quantization_config`.
        folder: Folder of the model, which may lack weights.

    Returns:
        Number of bytes; None for a model in full, and for quantised files that are not there.
    """
    if asked is None:
        files = weight_files(folder) if method_of(model.config) else []
        return sum(file.stat().st_size for file in files) or None
    quantizer: Any = AutoHfQuantizer.from_config(asked, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None)
    named = list(model.named_parameters())
    return int(sum(p.numel() * quantizer.param_element_size(model, n, p) for n, p in named))


def from_quantised(spec: ModelSpec, read: Any, *, quantised: bool) -> Any:
    """Call a reader of transformers; the message about its failure depends on the quantisation."""
    return readable(read, spec, _CURE) if quantised else readable(read, spec)


def compute_as_asked(model: nn.Module) -> None:
    """Let 4-bit layers of bitsandbytes compute in the asked dtype, with gradients, on every CPU.

    On a processor that multiplies bfloat16, the first pass without gradients would pack their
    weights for a kernel that rounds to bfloat16, takes 32 rows at a time, and has no backward:
    adapters trained after it would get wrong gradients, without an error.

    Args:
        model: A model as it was loaded.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def in_full(model: Any) -> Any:
    """Replace the quantised linear layers of a model by plain ones, in place.

    Args:
        model: A quantised model, without adapters.

    Returns:
        The model, whose weights are the numbers that the quantised ones stand for.
    """
    from peft.utils.integrations import dequantize_module_weight

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) and not hasattr(module, "W_q"):
            continue
        weight: Any = getattr(module, "weight", None)
        with torch.no_grad():
            restored = dequantize_module_weight(module)
        if restored is weight:
            continue
        bias: Any = getattr(module, "bias", None)
        plain = nn.Linear(restored.shape[1], restored.shape[0], bias is not None, device="meta")
        plain.weight = nn.Parameter(restored.detach().to(model.dtype), requires_grad=False)
        plain.bias = bias
        model.set_submodule(name, plain)
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    return model
