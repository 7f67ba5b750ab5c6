"""Formats of P-EAGLE and DFlash drafters in the speculators library, which vLLM reads.

vLLM embeds a mask slot as it embeds a token, so the slots' token is one that no text has, the first
after the target's: ``embed_tokens.weight`` contains the target's embeddings and, after them, that
of a slot. ``d2t`` is as in `kdcore_baselines.drafters.eagle3_layouts`; DFlash without a draft
vocabulary has the target's head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore import UserError
from kdcore.decoding.drafters.layouts import (
    ExportedDrafter,
    ImportedDrafter,
    refuse_biased_head,
    refuse_unordered_features,
    vllm_command,
)
from kdcore.decoding.layers.decoder_layer import LayerSize
from kdcore_baselines.drafters.eagle3_layouts import (
    LAYER_IDS,
    layer_config,
    layer_sizes,
    offsets,
    own_head,
    refuse_otherwise_made,
    speculators_config,
    with_vocabulary,
)

if TYPE_CHECKING:
    from kdcore.decoding.drafters.module import DraftingModule
    from kdcore.models.loading.loaded import LoadedModel

EMBEDDING = "embed_tokens.weight"
OF_HEAD = ("lm_head.weight", "d2t", "t2d")


def p_eagle_exported(drafter: Any, target: LoadedModel) -> ExportedDrafter:
    """Write a p_eagle; see `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    own, vocabulary = drafter.state_dict(), drafter.vocabulary
    refuse_unordered_features(drafter, target, "vLLM")
    head = own.pop("lm_head.weight")
    if vocabulary is None:
        # vLLM takes a head with as many rows as the target has tokens for one that also embeds
        # them, so token 0 has two equal rows.
        vocabulary = torch.arange(target.classes + 1) % target.classes
        head = torch.cat([head, head[:1]])
    embedding = _embedding(drafter, own.pop("mask_token"), target)
    weights = {
        re.sub(r"^upper\.(\d+)", lambda n: f"layers.{int(n[1]) + 1}", name): weight
        for name, weight in own.items()
        if name not in ("vocabulary", "mask_features")
    }
    weights = {name.replace("midlayer.", "layers.0."): each for name, each in weights.items()}
    weights |= {"mask_hidden": own["mask_features"][None], "lm_head.weight": head}
    config = {
        "architectures": ["PEagleDraftModel"],
        "draft_vocab_size": len(vocabulary),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "mask_token_id": target.classes,
        LAYER_IDS: list(drafter.layers),
        "transformer_layer_config": _layers(drafter, drafter.params.layers, target),
        **speculators_config("peagle", drafter, target),
    }
    return ExportedDrafter(
        config,
        weights | {EMBEDDING: embedding, "d2t": offsets(vocabulary)},
        vllm_command(target, "eagle3", drafter.depth, parallel_drafting=True),
    )


def dflash_exported(drafter: Any, target: LoadedModel) -> ExportedDrafter:
    """Write a dflash; see `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    own, vocabulary = drafter.state_dict(), drafter.vocabulary
    refuse_unordered_features(drafter, target, "vLLM")
    refuse_biased_head(target, "vLLM")
    embedding = _embedding(drafter, own.pop("mask_token"), target)
    weights = {
        name.replace("levels.", "layers."): weight
        for name, weight in own.items()
        if name != "vocabulary"
    }
    if vocabulary is not None:
        weights |= {"lm_head.weight": drafter.head.weight, "d2t": offsets(vocabulary)}
    layers = _layers(drafter, drafter.params.layers, target)
    config = {
        "architectures": ["DFlashDraftModel"],
        "draft_vocab_size": target.classes if vocabulary is None else len(vocabulary),
        "block_size": drafter.depth + 1,
        "mask_token_id": target.classes,
        "aux_hidden_state_layer_ids": list(drafter.layers),
        "transformer_layer_config": {**layers, "model_type": "qwen3"},
        **speculators_config("dflash", drafter, target),
    }
    command = vllm_command(target, "dflash", drafter.depth)
    return ExportedDrafter(config, weights | {EMBEDDING: embedding}, command)


def p_eagle_imported(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
) -> ImportedDrafter | None:
    """See `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    if config.get("speculators_model_type") != "peagle":
        return None
    params = _params(config, LAYER_IDS, "p_eagle", target)
    head = dict(weights)
    if len(head.get("d2t", ())) == target.classes + 1:  # see `p_eagle_exported`
        head = {"lm_head.weight": head["lm_head.weight"][:-1]}
    vocabulary, rows = own_head(head, target)
    state = {
        re.sub(r"^layers\.(\d+)", _layer_of_ours, name): weight
        for name, weight in weights.items()
        if name not in (EMBEDDING, "mask_hidden", *OF_HEAD)
    }
    state |= {
        "mask_features": weights["mask_hidden"].flatten(),
        "mask_token": _slot(config, weights, target),
        "lm_head.weight": rows,
    }
    return with_vocabulary(params, state, vocabulary)


def dflash_imported(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
) -> ImportedDrafter | None:
    """See `kdcore.decoding.drafters.layouts.ExchangedDrafter`."""
    if config.get("speculators_model_type") != "dflash":
        return None
    params = _params(config, "aux_hidden_state_layer_ids", "dflash", target)
    vocabulary = None
    if "lm_head.weight" in weights:
        vocabulary, rows = own_head(weights, target)
        shared: Tensor = target.model.get_output_embeddings().weight.detach().cpu()  # type: ignore[no-untyped-call]
        known = shared if vocabulary is None else shared[vocabulary]
        if not torch.equal(rows, known.to(rows.dtype)):
            raise UserError(
                f"the head of the drafter is not the head of {target.name}",
                "name the target that the drafter was trained for",
            )
    state = {
        name.replace("layers.", "levels."): weight
        for name, weight in weights.items()
        if name not in (EMBEDDING, *OF_HEAD)
    }
    state["mask_token"] = _slot(config, weights, target)
    return with_vocabulary(params, state, vocabulary)


def _layer_of_ours(number: re.Match[str]) -> str:
    return f"upper.{int(number[1]) - 1}" if number[1] != "0" else "midlayer"


def _embedding(drafter: DraftingModule, slot: Tensor, target: LoadedModel) -> Tensor:
    """[V + 1, H] what the drafter reads of each token of the target, and of a slot."""
    known = drafter.embed(torch.arange(target.classes, device=slot.device))
    return torch.cat([known.to(slot), slot[None]])


def _layers(drafter: Any, count: int, target: LoadedModel) -> dict[str, Any]:
    """The config of the layers, which embed one token more than the target."""
    more = {"vocab_size": target.classes + 1, "num_hidden_layers": count}
    features = {"num_aux_hidden_states": len(drafter.layers)}
    return {**layer_config(drafter.layer_size, target), **more, **features}


def _params(
    config: Mapping[str, Any], layer_ids: str, name: str, target: LoadedModel
) -> dict[str, Any]:
    """The params of a published drafter, whose layers must have the sizes of the target's."""
    layer = config["transformer_layer_config"]
    count = layer["num_hidden_layers"]
    refuse_otherwise_made({**layer, **config}, target, name, count)
    sizes = layer_sizes(layer)
    own = LayerSize.of(target.model)
    for part, said, ours in (
        ("number of heads", sizes["heads"], own.heads),
        ("number of key heads", sizes["key_heads"], own.key_heads),
        ("width of a head", sizes["head"], own.head),
        ("epsilon of the norms", sizes["eps"], own.eps),
        ("base of RoPE", sizes["theta"], own.theta),
    ):
        if said != ours:
            raise UserError(
                f"the {part} of the drafter is {said}, but {name} for {target.name} requires "
                f"{ours}",
                "train a drafter with kdcore",
            )
    proposals = config["speculators_config"]["proposal_methods"]
    return {
        "depth": proposals[0]["speculative_tokens"],
        "layers": count,
        "ffn": sizes["ffn"],
        "features": config[layer_ids],
    }


def _slot(config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel) -> Tensor:
    """[H] the embedding of a slot; the others must be the target's, which kdcore reads."""
    token = config["mask_token_id"]
    embedding: Any = target.model.get_input_embeddings()
    with torch.no_grad():
        shared: Tensor = embedding(torch.arange(target.classes, device=embedding.weight.device))
    table = weights.get(EMBEDDING, shared).cpu()
    shared = shared.cpu().to(table)
    others = torch.arange(target.classes) != token
    if not torch.equal(table[: target.classes][others], shared[others]):
        raise UserError(
            f"the drafter has its own embedding, but kdcore uses the embedding of {target.name}",
            "name the target that the drafter was trained for",
        )
    return table[token].clone()
