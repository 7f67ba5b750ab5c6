"""Format of a fasteagle for vLLM: the config and weights that `kdcore_fasteagle.vllm_model` reads.

The weights have the drafter's own names. A drafter with a vocabulary of its own also has the
target's head rows of its tokens (``lm_head.weight``) and ``d2t``, the offset from a token of the
draft vocabulary to the target's token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Embedding

from kdcore import UserError
from kdcore.decoding.drafters.layouts import (
    ExportedDrafter,
    ImportedDrafter,
    refuse_biased_head,
    refuse_unordered_features,
    vllm_command,
)
from kdcore.models.anatomy import context_of, layer_count
from kdcore_fasteagle.vllm_plugin import ARCHITECTURE

if TYPE_CHECKING:
    from kdcore import TrainedDrafter
    from kdcore.decoding.layers.decoder_layer import LayerSize
    from kdcore.models.loading.loaded import LoadedModel

UNLIMITED = 1 << 20
"""Context of a drafter whose target states none."""


def exported(
    drafter: TrainedDrafter, size: LayerSize, normalise: bool, target: LoadedModel
) -> ExportedDrafter:
    """Write a fasteagle for vLLM; see `kdcore.decoding.drafters.layouts.ExchangedDrafter`.

    Args:
        drafter: The drafter.
        size: Sizes of its layers.
        normalise: Whether it scales its inputs.
        target: Its target.

    Returns:
        The config and the weights.

    Raises:
        UserError: vLLM cannot give the drafter what it reads.
    """
    refuse_unordered_features(drafter, target, "vLLM")
    refuse_biased_head(target, "vLLM")
    if not normalise and type(target.model.get_input_embeddings()) is not Embedding:
        raise UserError(
            f"the embedding of {target.name} scales its output, which vLLM does not do for a "
            "drafter",
            "train a drafter with normalise: true",
        )
    head = drafter.head
    weights = {name: each for name, each in drafter.state_dict().items() if name != "vocabulary"}
    known = drafter.vocabulary
    if known is not None:
        assert head.weight is not None
        weights["lm_head.weight"] = head.weight
        weights["d2t"] = known.cpu() - torch.arange(len(known))
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": target.classes,
        "draft_vocab_size": target.classes if known is None else len(known),
        "hidden_size": size.hidden,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": drafter.depth,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "head_dim": size.head,
        "hidden_act": "silu",
        "rms_norm_eps": size.eps,
        "rope_theta": size.theta,
        "max_position_embeddings": context_of(target.model) or UNLIMITED,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": list(drafter.layers),
        # the token id by which vLLM marks placeholders: the first that no text has
        "pard_token": target.classes,
        "logit_scale": head.scale,
        "logit_soft_cap": head.cap,
        "kdcore_normalise": normalise,
        "kdcore_target_layers": layer_count(target.model),
    }
    command = vllm_command(target, "eagle3", drafter.depth, parallel_drafting=True)
    return ExportedDrafter(config, weights, command)


def imported(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
) -> ImportedDrafter | None:
    """See `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    if ARCHITECTURE not in (config.get("architectures") or ()):
        return None
    state = {name: each for name, each in weights.items() if name not in ("lm_head.weight", "d2t")}
    params = {
        "depth": config["num_hidden_layers"],
        "ffn": config["intermediate_size"],
        "features": config["eagle_aux_hidden_state_layer_ids"],
        "normalise": config["kdcore_normalise"],
    }
    if "d2t" in weights:
        state["vocabulary"] = weights["d2t"].long() + torch.arange(len(weights["d2t"]))
        params["vocabulary"] = len(weights["d2t"])
    return ImportedDrafter(params, state)
