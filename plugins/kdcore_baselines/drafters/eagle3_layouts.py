"""Formats of EAGLE-3 drafters in other engines.

``sglang`` is the format of the original publication: the layer is named ``midlayer``, and hidden
states are numbered as outputs of layers. ``vllm`` is the format of the speculators library: the
layer is named ``layers.0``, and hidden states are numbered as inputs of layers, as in kdcore. In
both, ``d2t`` is the offset from a token of the draft vocabulary to the target's token, and ``t2d``
marks the target's tokens that are in the draft vocabulary.
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
    sglang_command,
    vllm_command,
)
from kdcore.models.anatomy import layer_count
from kdcore.models.folder.files import served_name

if TYPE_CHECKING:
    from kdcore import TrainedDrafter
    from kdcore.decoding.layers.decoder_layer import LayerSize
    from kdcore.models.loading.loaded import LoadedModel

LAYOUTS = ("sglang", "vllm")
PUBLISHED = "LlamaForCausalLMEagle3"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
LAYER = {"sglang": "midlayer.", "vllm": "layers.0."}


def exported(
    drafter: TrainedDrafter, size: LayerSize, layout: str, target: LoadedModel
) -> ExportedDrafter:
    """Write an eagle3 in a layout; see `kdcore.decoding.drafters.layouts.ExchangedDrafter`.

    Args:
        drafter: The drafter.
        size: Sizes of its layer.
        layout: One of `LAYOUTS`.
        target: Its target.

    Returns:
        The config and the weights.

    Raises:
        UserError: The drafter reads hidden states that the engine cannot give.
    """
    read, count = drafter.layers, layer_count(target.model)
    if len(read) != 3 or not all(0 < layer < count for layer in read):
        raise UserError(
            f"{layout} requires three hidden states between 1 and {count - 1}, "
            f"but the drafter reads {list(read)}",
            f"train a drafter with three features between 1 and {count - 1}",
        )
    weights = {
        name.replace("midlayer.", LAYER[layout]): weight
        for name, weight in drafter.state_dict().items()
        if name != "vocabulary"
    }
    known = drafter.vocabulary
    vocabulary = torch.arange(target.classes) if known is None else known.cpu()
    weights["d2t"] = offsets(vocabulary)
    weights["t2d"] = torch.zeros(target.classes, dtype=torch.bool).index_fill(0, vocabulary, True)
    layer = layer_config(size, target)
    if layout == "sglang":
        own = {
            "architectures": [PUBLISHED],
            "draft_vocab_size": len(vocabulary),
            "eagle_config": {
                "use_aux_hidden_state": True,
                LAYER_IDS: [each - 1 for each in read],
            },
        }
        return ExportedDrafter({**own, **layer}, weights, sglang_command(target, drafter.depth))
    config = {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": len(vocabulary),
        "norm_before_residual": False,
        "norm_before_fc": False,
        LAYER_IDS: list(read),
        "transformer_layer_config": layer,
        **speculators_config("eagle3", drafter, target),
    }
    return ExportedDrafter(config, weights, vllm_command(target, "eagle3", drafter.depth))


def speculators_config(kind: str, drafter: TrainedDrafter, target: LoadedModel) -> dict[str, Any]:
    """Build what a config of the speculators library says of every drafter.

    Args:
        kind: The library's name of the kind of drafter.
        drafter: The drafter.
        target: Its target.
    """
    return {
        "speculators_model_type": kind,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": drafter.depth,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": served_name(target.name),
                "architectures": [type(target.model).__name__],
            },
        },
        "torch_dtype": "float32",
    }


def imported(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
) -> ImportedDrafter | None:
    """See `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    of_vllm = config.get("speculators_model_type") == "eagle3"
    named = PUBLISHED in (config.get("architectures") or ())
    # the original repository gives its folders the target's architecture
    if not of_vllm and not named and not any(each.startswith("midlayer.") for each in weights):
        return None
    layer = config["transformer_layer_config"] if of_vllm else config
    if of_vllm and config.get("norm_before_residual") is None:
        raise UserError(
            "config.json of the drafter lacks norm_before_residual; vLLM assumes true, and "
            "speculators assumes false",
            "add the value from training to config.json",
        )
    nested = config.get("eagle_config") or {}
    refuse_otherwise_made({**layer, **config, **nested}, target)
    _refuse_own_embedding(weights, target)
    state = {
        name.replace("layers.0.", "midlayer."): weight
        for name, weight in weights.items()
        if name not in ("d2t", "t2d", "embed_tokens.weight")
    }
    outputs = nested.get(LAYER_IDS)
    # engines number these ids differently by where they stand
    features = [each + 1 for each in outputs] if outputs else config.get(LAYER_IDS)
    params: dict[str, Any] = {"layer": layer_sizes(layer), "features": features}
    _refuse_other_sizes(state, params, layer["hidden_size"])
    if of_vllm:
        params["depth"] = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    vocabulary, state["lm_head.weight"] = own_head(weights, target)
    notes = (_convention(outputs),) if outputs else ()
    return with_vocabulary(params, state, vocabulary, notes)


def with_vocabulary(
    params: dict[str, Any],
    state: dict[str, Tensor],
    vocabulary: Tensor | None,
    notes: tuple[str, ...] = (),
) -> ImportedDrafter:
    """Add the draft vocabulary to what was read of a published drafter.

    Args:
        params: The drafter's params.
        state: Its weights.
        vocabulary: [V'] int64, or None for all tokens.
        notes: What the user should know of the import.

    Returns:
        The drafter.
    """
    if vocabulary is None:
        return ImportedDrafter(params, state, notes)
    told = {**params, "vocabulary": len(vocabulary)}
    return ImportedDrafter(told, {**state, "vocabulary": vocabulary}, notes)


def offsets(vocabulary: Tensor) -> Tensor:
    """``d2t`` of a draft vocabulary [V']."""
    return vocabulary.cpu() - torch.arange(len(vocabulary))


def own_head(weights: Mapping[str, Tensor], target: LoadedModel) -> tuple[Tensor | None, Tensor]:
    """Read the head of a published drafter.

    Args:
        weights: Weights of the drafter.
        target: Its target.

    Returns:
        The draft vocabulary [V'] int64, ascending, None for all tokens; and the head's rows [V', H]
        in this order.

    Raises:
        UserError: ``d2t`` does not fit the head, the target or ``t2d``.
    """
    head = weights["lm_head.weight"]
    if "d2t" not in weights:
        return None, head
    offsets = weights["d2t"].long()
    vocabulary, order = (offsets + torch.arange(len(offsets))).sort()
    if len(order) != len(head):
        raise UserError(
            f"d2t of the drafter has {len(order)} tokens, but lm_head.weight has {len(head)}",
            "download the folder again",
        )
    if vocabulary[0] < 0 or vocabulary[-1] >= target.classes or (vocabulary.diff() < 1).any():
        raise UserError(
            f"the draft vocabulary does not fit {target.name}, which has {target.classes} tokens",
            "name the target that the drafter was trained for",
        )
    if "t2d" in weights and not weights["t2d"].nonzero().flatten().equal(vocabulary):
        raise UserError(
            "d2t and t2d of the drafter define different draft vocabularies",
            "download the folder again",
        )
    return (vocabulary if len(vocabulary) < target.classes else None), head[order]


def _convention(outputs: list[int]) -> str:
    return (
        f"eagle_config of the drafter lists the layers {outputs}; kdcore and SGLang read the "
        "outputs of these layers, and vLLM reads their inputs. If few drafts are accepted, move "
        f"{LAYER_IDS} out of eagle_config and import again: kdcore then reads the inputs"
    )


def layer_config(size: LayerSize, target: LoadedModel) -> dict[str, Any]:
    """Build the config of a drafter's layers in Llama's format."""
    text = target.model.config.get_text_config()
    return {
        "model_type": "llama",
        "vocab_size": target.classes,
        "hidden_size": size.hidden,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": 1,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "head_dim": size.head,
        "hidden_act": "silu",
        "rms_norm_eps": size.eps,
        "rope_theta": size.theta,
        "max_position_embeddings": getattr(text, "max_position_embeddings", 2048),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def layer_sizes(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Read the layer's params from a config in Llama's format, with Llama's defaults."""
    heads, rope = layer["num_attention_heads"], layer.get("rope_parameters") or {}
    return {
        "ffn": layer["intermediate_size"],
        "heads": heads,
        "key_heads": layer.get("num_key_value_heads") or heads,
        "head": layer.get("head_dim") or layer["hidden_size"] // heads,
        "eps": layer.get("rms_norm_eps", 1e-6),
        "theta": layer.get("rope_theta") or rope.get("rope_theta", 10000.0),
    }


def _refuse_other_sizes(
    state: Mapping[str, Tensor], params: Mapping[str, Any], hidden: int
) -> None:
    """Raise UserError if weights do not have the sizes in the config, before any allocation."""
    sizes, features = params["layer"], params["features"]
    for name, axis, said in (
        ("midlayer.mlp.gate_proj.weight", 0, sizes["ffn"]),
        ("midlayer.self_attn.q_proj.weight", 0, sizes["heads"] * sizes["head"]),
        ("midlayer.self_attn.k_proj.weight", 0, sizes["key_heads"] * sizes["head"]),
        ("fc.weight", 1, (len(features) if features else 3) * hidden),
    ):
        found = state[name].shape[axis]
        if found != said:
            raise UserError(
                f"dimension {axis} of {name} is {found}, but the config requires {said}",
                "download the folder again",
            )


def refuse_otherwise_made(
    config: Mapping[str, Any], target: LoadedModel, name: str = "eagle3", layers: int = 1
) -> None:
    """Raise UserError if a published drafter has parts that a component does not have.

    Args:
        config: Config of the drafter, its layer's fields included.
        target: Its target.
        name: Name of the component.
        layers: Number of layers that the component has.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    hidden = target.model.config.get_text_config().hidden_size
    for part, value, ours in (
        ("num_hidden_layers", config.get("num_hidden_layers", 1), layers),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(config.get("attention_bias")), False),
        ("norm_before_residual", bool(config.get("norm_before_residual")), False),
        ("norm_before_fc", bool(config.get("norm_before_fc")), False),
        ("fc_norm", bool(config.get("fc_norm")), False),
        ("norm_output", bool(config.get("norm_output")), False),
        ("use_aux_hidden_state", bool(config.get("use_aux_hidden_state", True)), True),
        ("use_last_layernorm", bool(config.get("use_last_layernorm", True)), True),
        ("use_mtp_layernorm", bool(config.get("use_mtp_layernorm")), False),
        ("type of RoPE", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("hidden_size", config["hidden_size"], hidden),
    ):
        if value != ours:
            raise UserError(
                f"{part} of the drafter is {value}, but {name} for {target.name} requires {ours}",
                "import a drafter with the published architecture, for its own target",
            )


def _refuse_own_embedding(weights: Mapping[str, Tensor], target: LoadedModel) -> None:
    own = weights.get("embed_tokens.weight")
    embedding: Any = target.model.get_input_embeddings()
    shared = embedding.weight.detach().cpu()
    if own is not None and not (
        own.shape == shared.shape and torch.equal(own, shared.to(own.dtype))
    ):
        raise UserError(
            f"the drafter has its own embedding, but eagle3 uses the embedding of {target.name}",
            "name the target that it was trained for, or a drafter without embed_tokens",
        )
