"""P-EAGLE and DFlash in float64 as decoding would run them: one anchor after the other.

Weights are given by the names that the modules' state dicts have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .decoder_layer import Weights, below, layer, norm, rotated, swiglu
from .eagle3 import step


def p_eagle(features: Tensor, embedded: Tensor, weights: Weights, size, depth: int) -> Tensor:
    """[T - 1, D, H] of one sequence: features [T, F], embeddings of its tokens [T, H]."""
    upper = {name.split(".")[1] for name in weights if name.startswith("upper.")}
    found = []
    for anchor in range(len(features) - 1):
        states = [weights["fc.weight"] @ features[row] for row in range(anchor + 1)]
        tokens = [embedded[row + 1] for row in range(anchor + 1)]
        states += [weights["fc.weight"] @ weights["mask_features"]] * (depth - 1)
        tokens += [weights["mask_token"]] * (depth - 1)
        keys: list[tuple[Tensor, Tensor]] = []
        first = below(weights, "midlayer")
        rows = [
            step(state, token, place, keys, first, size)
            for place, (state, token) in enumerate(zip(states, tokens, strict=True))
        ]
        for number in sorted(upper, key=int):
            rows = layer(rows, below(weights, f"upper.{number}"), size)
        read = [norm(x, weights["norm.weight"], size.eps) for x in rows[anchor:]]
        found.append(torch.stack(read))
    return torch.stack(found)


def dflash(features: Tensor, embedded: Tensor, weights: Weights, size, depth: int) -> Tensor:
    """[T - 1, D, H] of one sequence: features [T, F], embeddings of its tokens [T, H]."""
    levels = {name.split(".")[1] for name in weights if name.startswith("levels.")}
    context = [
        norm(weights["fc.weight"] @ each, weights["hidden_norm.weight"], size.eps)
        for each in features
    ]
    found = []
    for anchor in range(len(features) - 1):
        block = [embedded[anchor + 1], *[weights["mask_token"]] * depth]
        for number in sorted(levels, key=int):
            block = _level(block, context[: anchor + 1], below(weights, f"levels.{number}"), size)
        found.append(torch.stack([norm(x, weights["norm.weight"], size.eps) for x in block[1:]]))
    return torch.stack(found)


def _level(block: list[Tensor], context: list[Tensor], weights: Weights, size) -> list[Tensor]:
    own = below(weights, "self_attn")
    normed = [norm(x, weights["input_layernorm.weight"], size.eps) for x in block]

    def heads(name: str, x: Tensor) -> Tensor:
        return (own[f"{name}_proj.weight"] @ x).view(-1, size.head)

    def turned(name: str, x: Tensor, position: int) -> list[Tensor]:
        scale = own[f"{name}_norm.weight"]
        return [
            rotated(norm(each, scale, size.eps), position, size.theta) for each in heads(name, x)
        ]

    seen = [*context, *normed]
    keys = [turned("k", x, position) for position, x in enumerate(seen)]
    values = [heads("v", x) for x in seen]
    out = []
    for slot, x in enumerate(block):
        queries, read = turned("q", normed[slot], len(context) + slot), []
        for head, query in enumerate(queries):
            shared = head // (size.heads // size.key_heads)
            scores = [math.exp(float(query @ key[shared]) / math.sqrt(size.head)) for key in keys]
            read.append(
                sum(
                    score / sum(scores) * value[shared]
                    for score, value in zip(scores, values, strict=True)
                )
            )
        hidden = x + own["o_proj.weight"] @ torch.cat(read)
        second = norm(hidden, weights["post_attention_layernorm.weight"], size.eps)
        out.append(hidden + swiglu(second, below(weights, "mlp")))
    return out
