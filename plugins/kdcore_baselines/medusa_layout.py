"""Format of Medusa heads for vLLM's own method ``medusa``.

A head is a block with one layer. vLLM does not share the target's head, so the folder contains it:
``lm_head.weight``, which all blocks use, with the rows of the draft vocabulary (``token_map``).
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
    from kdcore.models.loaded import LoadedModel
    from kdcore_baselines.medusa import Medusa


def exported(drafter: Medusa, target: LoadedModel) -> ExportedDrafter:
    """See `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    refuse_biased_head(target, "vLLM")
    head, known = drafter.head, drafter.vocabulary
    assert head.weight is not None
    weights = {"lm_head.weight": head.weight}
    if known is not None:
        weights["token_map"] = known
    for name, weight in drafter.heads.named_parameters():
        for i, block in enumerate(weight.chunk(drafter.depth)):
            weights[f"blocks.{i}.layers.0.{name}"] = block
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": head.weight.shape[1],
        "vocab_size": target.classes,
        "truncated_vocab_size": target.classes if known is None else len(known),
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
    depth, known = config["num_heads"], weights.get("token_map")
    shared: Tensor = target.model.get_output_embeddings().weight.detach().cpu()  # type: ignore[no-untyped-call]
    rows = shared if known is None else shared[known]
    if "blocks.0.layers.1.weight" in weights or "lm_heads.0.weight" in weights:
        raise UserError(
            "the drafter has more than one layer in each block, or a head for each block",
            "import Medusa heads with one layer that share the head of the target",
        )
    if not torch.equal(weights["lm_head.weight"], rows.to(weights["lm_head.weight"].dtype)):
        raise UserError(
            f"the head of the drafter is not the head of {target.name}",
            "name the target that the drafter was trained for",
        )
    params: dict[str, Any] = {"depth": depth}
    state = {
        f"heads.{name}": torch.cat([weights[f"blocks.{i}.layers.0.{name}"] for i in range(depth)])
        for name in ("weight", "bias")
    }
    if known is not None:
        params["vocabulary"] = len(known)
        state["vocabulary"] = known
    return ImportedDrafter(params, state)
