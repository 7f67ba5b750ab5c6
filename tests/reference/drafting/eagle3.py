"""EAGLE-3 in float64 as decoding would run it: from each anchor on, one token after the other.

Weights are given by the names that the module's state dict has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .decoder_layer import Weights, below, norm, rotated, swiglu


def eagle3(features: Tensor, embedded: Tensor, weights: Weights, size, depth: int) -> Tensor:
    """[T - D, D, H] of one sequence: features [T, F], embeddings of its tokens [T, H].

    Only for the anchors behind which D tokens stand.
    """
    layer = below(weights, "midlayer")
    found = []
    for anchor in range(len(features) - depth):
        keys: list[tuple[Tensor, Tensor]] = []
        for row in range(anchor + 1):
            fused = weights["fc.weight"] @ features[row]
            out = step(fused, embedded[row + 1], row, keys, layer, size)
        levels = [out]
        for ahead in range(1, depth):
            place = anchor + ahead
            levels.append(step(levels[-1], embedded[place + 1], place, keys, layer, size))
        found.append(torch.stack([norm(x, weights["norm.weight"], size.eps) for x in levels]))
    return torch.stack(found)


def step(
    hidden: Tensor,
    token: Tensor,
    position: int,
    keys: list[tuple[Tensor, Tensor]],
    weights: Weights,
    size,
) -> Tensor:
    """What the layer gives for one token, which is added to the keys and values [heads, W]."""
    both = torch.cat(
        [
            norm(token, weights["input_layernorm.weight"], size.eps),
            norm(hidden, weights["hidden_norm.weight"], size.eps),
        ]
    )

    def heads(name: str, count: int) -> Tensor:
        return (weights[f"self_attn.{name}_proj.weight"] @ both).view(count, size.head)

    queries, key, value = (
        heads("q", size.heads),
        heads("k", size.key_heads),
        heads("v", size.key_heads),
    )
    keys.append((torch.stack([rotated(each, position, size.theta) for each in key]), value))
    read = []
    for head in range(size.heads):
        shared = head // (size.heads // size.key_heads)
        query = rotated(queries[head], position, size.theta)
        scores = [math.exp(float(query @ key[shared]) / math.sqrt(size.head)) for key, _ in keys]
        total = sum(scores)
        read.append(
            sum(
                score / total * value[shared]
                for score, (_, value) in zip(scores, keys, strict=True)
            )
        )
    hidden = hidden + weights["self_attn.o_proj.weight"] @ torch.cat(read)
    second = weights["post_attention_layernorm.weight"]
    return hidden + swiglu(norm(hidden, second, size.eps), below(weights, "mlp"))
