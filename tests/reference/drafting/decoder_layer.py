"""A drafter's decoder layer and FastEagle's cascade in float64, one row and one number at a time.

Weights are given by the names that the modules' state dicts have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def below(weights: Weights, name: str) -> dict[str, Tensor]:
    """The weights of one part."""
    return {k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(f"{name}.")}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of one vector."""
    square = float(sum(value**2 for value in x)) / len(x)
    return x / math.sqrt(square + eps) * weight


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector: the pair (i, i + W / 2) turned by position * theta^(-2i / W)."""
    half = len(x) // 2
    turned = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return turned


def attention(rows: list[Tensor], weights: Weights, size) -> list[Tensor]:
    """Causal; query head n reads key head n // (heads / key heads)."""
    heads_of = {}
    for name, count in (("q", size.heads), ("k", size.key_heads), ("v", size.key_heads)):
        heads_of[name] = [(weights[f"{name}_proj.weight"] @ x).view(count, size.head) for x in rows]
    out = []
    for place in range(len(rows)):
        read = []
        for head in range(size.heads):
            shared = head // (size.heads // size.key_heads)
            query = rotated(heads_of["q"][place][head], place, size.theta)
            scores = [
                float(query @ rotated(heads_of["k"][before][shared], before, size.theta))
                / math.sqrt(size.head)
                for before in range(place + 1)
            ]
            total = sum(math.exp(score) for score in scores)
            read.append(
                sum(
                    math.exp(score) / total * heads_of["v"][before][shared]
                    for before, score in enumerate(scores)
                )
            )
        out.append(weights["o_proj.weight"] @ torch.cat(read))
    return out


def swiglu(x: Tensor, weights: Weights) -> Tensor:
    gate, up = weights["gate_proj.weight"] @ x, weights["up_proj.weight"] @ x
    return weights["down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def layer(rows: list[Tensor], weights: Weights, size) -> list[Tensor]:
    """h = x + attention(norm(x)); h + swiglu(norm(h))."""
    normed = [norm(x, weights["input_layernorm.weight"], size.eps) for x in rows]
    attended = attention(normed, below(weights, "self_attn"), size)
    rows = [x + a for x, a in zip(rows, attended, strict=True)]
    second = weights["post_attention_layernorm.weight"]
    return [x + swiglu(norm(x, second, size.eps), below(weights, "mlp")) for x in rows]


def fasteagle(
    features: Tensor, embedded: Tensor, weights: Weights, size, normalise: bool
) -> Tensor:
    """[T, D, H] of one sequence: features [T, F], and the embedding of the next token [T, H]."""
    hidden = embedded.shape[1]

    def scaled(state: Tensor) -> Tensor:
        return norm(state, torch.ones_like(state), size.eps) if normalise else state

    rows = []
    for feature, token in zip(features, embedded, strict=True):
        read = torch.cat([scaled(feature[i : i + hidden]) for i in range(0, len(feature), hidden)])
        fused = weights["fuse_features.weight"] @ read
        rows.append(weights["fuse_token.weight"] @ torch.cat([fused, scaled(token)]))
    levels, depth = [], len({name.split(".")[1] for name in weights if name.startswith("levels.")})
    scales = weights.get("norms", ())  # of each level, of all levels, or of none
    for place in range(depth):
        rows = layer(rows, below(weights, f"levels.{place}"), size)
        read = list(rows)
        if len(scales):
            read = [norm(x, scales[place % len(scales)], size.eps) for x in rows]
        levels.append(torch.stack(read))
    return torch.stack(levels, dim=1)
