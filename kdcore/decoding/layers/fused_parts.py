"""Attention, gated MLPs and norms with fewer and larger operations than in their modules.

A pass over a few tokens on a CPU consists of about two thousand small operations, whose call
overhead dominates. Here, matrices with the same input are multiplied as one, queries and keys are
rotated together, and keys and values are not copied for the query heads that share them.

A part replaces a module after a trial. Gated MLPs and norms are recognised by their form, since
they depend on their input alone; attention is recognised by its class. Other modules do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.decoding.layers.attention import attend_grouped
from kdcore.decoding.layers.decoder_layer import Attend, Attention, Rotation, SwiGLU, causal
from kdcore.decoding.layers.packed_weights import PackedWeights, is_for_cpu, is_plain

ATTENTION = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
"""Classes of transformers that compute plain grouped-query attention with RoPE."""
TOKENS = 5
"""Number of tokens in a trial."""


class Part(Protocol):
    """A replacement for the forward of a module, with copies of its weights."""

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """Random arguments for the module's forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, in float32 and without gradients."""


class GatedMLP:
    """down(act(gate(x)) * up(x)), for any module of this form."""

    def __init__(self, module: Any) -> None:
        self.gate_up = PackedWeights.of(module.gate_proj, module.up_proj)
        self.down = PackedWeights.of(module.down_proj)
        self.activation: Callable[[Tensor], Tensor] = getattr(module, "act_fn", F.silu)

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """See `Part`."""
        return (torch.randn(1, TOKENS, self.gate_up.inputs, generator=generator),)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, A, H] from [B, A, H]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the module consists of the three matrices and an activation."""
        linears = {"gate_proj", "up_proj", "down_proj"}
        parts = dict(module.named_children())
        return (
            set(parts) - {"act_fn"} == linears
            and all(is_plain(parts[name]) for name in linears)
            and ("act_fn" in parts or isinstance(module, SwiGLU))
        )


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale, where the scale is the weight plus ``more``."""

    def __init__(self, module: Any, more: float = 0.0) -> None:
        self.scale = module.weight.detach().float() + more
        self.eps: float = _eps(module)

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """See `Part`."""
        return (torch.randn(1, TOKENS, len(self.scale), generator=generator),)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] from [..., H]."""
        return F.rms_norm(x, self.scale.shape, self.scale, self.eps)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the module is an RMSNorm by name, with a weight as its only parameter."""
        return (
            type(module).__name__.endswith("RMSNorm")
            and not isinstance(module, nn.RMSNorm)  # computes as this does
            and [name for name, _ in module.named_parameters()] == ["weight"]
            and is_for_cpu(next(module.parameters()))
            and isinstance(_eps(module), float)
        )


class GroupedAttention:
    """A replacement for `kdcore.decoding.layers.decoder_layer.Attention`."""

    def __init__(self, module: Any) -> None:
        self.width: int = getattr(module, "head", None) or module.head_dim
        self.qkv = PackedWeights.of(module.q_proj, module.k_proj, module.v_proj)
        self.out = PackedWeights.of(module.o_proj)
        self.heads = module.q_proj.out_features // self.width
        self.key_heads = module.k_proj.out_features // self.width
        half = torch.ones(self.width // 2)
        self.sign = torch.cat([-half, half])
        self.norm: Tensor | None = None
        if hasattr(module, "q_norm"):  # a norm of each head before the rotation
            query, key = (each.weight.detach().float() for each in (module.q_norm, module.k_norm))
            self.norm = torch.cat([query.expand(self.heads, -1), key.expand(self.key_heads, -1)])
            self.eps = _eps(module.q_norm)

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """See `Part`."""
        x, angles = self._some(generator)
        return x, (angles.cos()[:, None], angles.sin()[:, None]), causal

    def _some(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens [1, A, wide] and angles [1, A, W]."""
        x = torch.randn(1, TOKENS, self.qkv.inputs, generator=generator)
        angles = torch.randn(1, TOKENS, self.width // 2, generator=generator)
        return x, torch.cat([angles, angles], dim=-1)

    def __call__(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """[B, A, H] from ``x`` [B, A, wide]."""
        cos, sin = rotation
        heads = self.qkv(x).unflatten(-1, (-1, self.width)).transpose(1, 2)  # type: ignore[no-untyped-call]
        turned, value = torch.split(heads, [self.heads + self.key_heads, self.key_heads], dim=1)
        if self.norm is not None:
            turned = F.rms_norm(turned, (self.width,), eps=self.eps) * self.norm[:, None]
        # The two halves of W form the pairs: (a, b) becomes (a cos - b sin, b cos + a sin).
        other = turned.roll(self.width // 2, -1)
        turned = torch.addcmul(turned * cos, other, sin * self.sign)
        query, key = torch.split(turned, [self.heads, self.key_heads], dim=1)
        return self.out(attend(query, key, value).transpose(1, 2).flatten(2))

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the module is an `Attention` with plain matrices."""
        return type(module) is Attention and _has_plain_matrices(module)


class TransformersAttention(GroupedAttention):
    """A replacement for the attention modules of transformers in `ATTENTION`."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.index: int = module.layer_idx
        self.scaling: float = module.scaling

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """See `Part`."""
        x, angles = self._some(generator)
        return x, (angles.cos(), angles.sin()), None

    def __call__(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[B, A, H] from [B, A, H], and None for the attention weights, as in transformers."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.index)
            return attend_grouped(query, key, value, attention_mask, self.scaling)

        cos, sin = position_embeddings
        rotation = cos[:, None], sin[:, None]
        return super().__call__(hidden_states, rotation, attend), None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the module is of a known class, uses sdpa, and has plain matrices."""
        kind, config = type(module), getattr(module, "config", None)
        return (
            kind.__name__ in ATTENTION
            and kind.__module__.startswith("transformers.models.")
            and getattr(config, "_attn_implementation", None) == "sdpa"
            and _has_plain_matrices(module)
        )


def _has_plain_matrices(module: nn.Module) -> bool:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return all(is_plain(getattr(module, name)) for name in names)


def _eps(module: Any) -> Any:
    """The epsilon of a norm, under either of its names."""
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
