"""The decoder layer of drafters: RMSNorm, grouped-query attention with RoPE, SwiGLU.

Its parameters have the names of Llama's. The caller provides the attention: over a whole sequence
in training, through a `kdcore.decoding.drafters.row_cache.RowCache` in decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.errors import UserError
from kdcore.models.anatomy import LayerFacts, layer_facts

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function from rotated queries [B, heads, A, W], keys and values [B, key heads, A, W] to the
attention output [B, heads, A, W]."""

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines [B or 1, 1, A, W]."""


@dataclass(frozen=True, slots=True)
class LayerSize(LayerFacts):
    """The sizes of a drafter's layer, with the attributes of `kdcore.models.anatomy.LayerFacts`.

    Raises:
        UserError: The number of heads is not a multiple of the key heads, or the width W of a head
            is odd.
    """

    def __post_init__(self) -> None:
        if self.heads % self.key_heads or self.head % 2:
            raise UserError(
                f"a drafter's layer cannot have {self.heads} heads with {self.key_heads} key heads "
                f"of width {self.head}",
                "use an even width and a multiple of the key heads; the default is the target's, "
                "and eagle3 accepts others (layer: {heads, key_heads, head})",
            )

    @classmethod
    def of(cls, model: PreTrainedModel, feed_forward: int | None = None) -> LayerSize:
        """The sizes of a language model's layers, or the usual ones where it does not have them.

        Args:
            model: The language model.
            feed_forward: Width inside the SwiGLU (default: the model's).

        Returns:
            The sizes.

        Raises:
            UserError: The sizes are invalid.
        """
        found = asdict(layer_facts(model))
        return cls(**found | ({"feed_forward": feed_forward} if feed_forward else {}))

    def rotation(self, positions: Tensor) -> Rotation:
        """The rotation of positions.

        Args:
            positions: [B or 1, A] int64.

        Returns:
            Cosines and sines, [B or 1, 1, A, W] each.
        """
        half = torch.arange(0, self.head, 2, device=positions.device) / self.head
        angles = positions[:, None, :, None] * self.theta**-half
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over whole sequences: an `Attend`.

    Args:
        query: [B, heads, A, W].
        key: [B, key heads, A, W].
        value: [B, key heads, A, W].

    Returns:
        [B, heads, A, W].
    """
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention.

    Args:
        size: Sizes of the layer.
        wide: Width of the inputs (default: H).
    """

    def __init__(self, size: LayerSize, wide: int | None = None) -> None:
        super().__init__()
        wide = wide or size.hidden
        self.head = size.head
        self.q_proj = nn.Linear(wide, size.heads * size.head, bias=False)
        self.k_proj = nn.Linear(wide, size.key_heads * size.head, bias=False)
        self.v_proj = nn.Linear(wide, size.key_heads * size.head, bias=False)
        self.o_proj = nn.Linear(size.heads * size.head, size.hidden, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """[B, A, H] from ``x`` [B, A, wide]."""
        query = rotated(self.in_heads(self.q_proj(x)), rotation)
        key = rotated(self.in_heads(self.k_proj(x)), rotation)
        read = attend(query, key, self.in_heads(self.v_proj(x)))
        out: Tensor = self.o_proj(read.transpose(1, 2).flatten(2))
        return out

    def in_heads(self, x: Tensor) -> Tensor:
        """[B, heads, A, W] from [B, A, heads * W]."""
        return x.reshape(*x.shape[:2], -1, self.head).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.feed_forward, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.feed_forward, bias=False)
        self.down_proj = nn.Linear(size.feed_forward, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, A, H] from [B, A, H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); h + SwiGLU(norm(h)).

    Args:
        size: The sizes, `LayerSize.of` the target.
    """

    def __init__(self, size: LayerSize) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.hidden, size.eps)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden, size.eps)
        self.mlp = SwiGLU(size)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Compute the layer's output.

        Args:
            x: [B, A, H] hidden states.
            rotation: That of their positions, from `LayerSize.rotation`.
            attend: How a query reaches the keys: `causal`, or one of a `RowCache`.

        Returns:
            [B, A, H].
        """
        x = x + self.self_attn(self.input_layernorm(x), rotation, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding; the two halves of W form the pairs.

    Args:
        x: [B, heads, A, W].
        rotation: That of the positions, from `LayerSize.rotation`.

    Returns:
        [B, heads, A, W].
    """
    cos, sin = (each.to(x.dtype) for each in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
