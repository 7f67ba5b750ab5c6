"""Format of Medusa heads for vLLM's own method ``medusa``.

A head is a block with one layer. vLLM does not share the target's head, so the folder contains it:
``lm_head.weight``, which all blocks use. vLLM 0.32 does not load one with a draft vocabulary: it
demands that its ``token_map`` be loaded as a weight, and does not count it as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore import UserError
from kdcore.decoding.drafters.layouts import (
    ExportedDrafter,
    ImportedDrafter,
    refuse_biased_head,
    vllm_command,
)

if TYPE_CHECKING:
    from kdcore import TrainedDrafter
    from kdcore.models.loading.loaded import LoadedModel


def exported(drafter: TrainedDrafter, target: LoadedModel) -> ExportedDrafter:
    """See `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    refuse_biased_head(target, "vLLM")
    if drafter.vocabulary is not None:
        raise UserError(
            "vLLM does not load Medusa heads with a draft vocabulary, but the drafter has one of "
            f"{len(drafter.vocabulary)} tokens",
            "train the drafter with vocabulary: null",
        )
    head = drafter.head
    assert head.weight is not None
    weights = {"lm_head.weight": head.weight}
    for name, weight in drafter.state_dict().items():  # heads.weight and heads.bias
        for i, block in enumerate(weight.chunk(drafter.depth)):
            weights[f"blocks.{i}.layers.0.{name.removeprefix('heads.')}"] = block
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": head.weight.shape[1],
        "vocab_size": target.classes,
        "num_heads": drafter.depth,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": True,
        "logit_scale": head.scale,
        "torch_dtype": "float32",
    }
    return ExportedDrafter(config, weights, vllm_command(target, "medusa", drafter.depth))


def imported(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
) -> ImportedDrafter | None:
    """See `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    if config.get("model_type") != "medusa" or "blocks.0.layers.0.weight" not in weights:
        return None
    depth = config["num_heads"]
    shared: Tensor = target.model.get_output_embeddings().weight.detach().cpu()  # type: ignore[no-untyped-call]
    if "blocks.0.layers.1.weight" in weights or "lm_heads.0.weight" in weights:
        raise UserError(
            "the drafter has more than one layer in each block, or a head for each block",
            "import Medusa heads with one layer that share the head of the target",
        )
    if not torch.equal(weights["lm_head.weight"], shared.to(weights["lm_head.weight"].dtype)):
        raise UserError(
            f"the head of the drafter is not the head of {target.name}",
            "name the target that the drafter was trained for",
        )
    state = {
        f"heads.{name}": torch.cat([weights[f"blocks.{i}.layers.0.{name}"] for i in range(depth)])
        for name in ("weight", "bias")
    }
    return ImportedDrafter({"depth": depth}, state)
