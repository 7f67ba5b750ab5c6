"""Attention, gated MLPs and norms, computed by fewer and larger operations than their modules do.

A CPU's pass over a few tokens is some two thousand small operations, most of whose time is that of
calling them. Matrices that read one input are multiplied as one; queries and keys are rotated
together; keys and values are not copied for the query heads that share them.

Which modules these can stand in for is seen from the modules: a gated MLP and a norm depend on
their input alone, so a module of their form is tried on some; attention is known by its class, and
tried as well. All else is left as it is.
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
"""Classes of transformers that compute grouped-query attention with RoPE and nothing beside it."""
TOKENS = 5
"""That a part is tried on."""


class Part(Protocol):
    """What a module computes, from copies of its weights."""

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """Random arguments for the module's forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's forward, in float32 and without a gradient."""


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
        """Whether the module has these matrices, and nothing beside them but the activation."""
        linears = {"gate_proj", "up_proj", "down_proj"}
        parts = dict(module.named_children())
        return (
            set(parts) - {"act_fn"} == linears
            and all(is_plain(parts[name]) for name in linears)
            and ("act_fn" in parts or isinstance(module, SwiGLU))
        )


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale, where the scale is the weight, or the weight and one."""

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
        """Whether the module is called one, and has a weight and nothing else."""
        return (
            type(module).__name__.endswith("RMSNorm")
            and not isinstance(module, nn.RMSNorm)  # computes as this does
            and [name for name, _ in module.named_parameters()] == ["weight"]
            and is_for_cpu(next(module.parameters()))
            and isinstance(_eps(module), float)
        )


class GroupedAttention:
    """As `kdcore.decoding.layers.decoder_layer.Attention`, whose stand-in it is."""

    def __init__(self, module: Any) -> None:
        self.width: int = getattr(module, "head", None) or module.head_dim
        self.qkv = PackedWeights.of(module.q_proj, module.k_proj, module.v_proj)
        self.out = PackedWeights.of(module.o_proj)
        self.heads = module.q_proj.out_features // self.width
        self.key_heads = module.k_proj.out_features // self.width
        half = torch.ones(self.width // 2)
        self.sign = torch.cat([-half, half])
        self.norm: Tensor | None = None
        if hasattr(module, "q_norm"):  # of each head, before it is rotated
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
        # The two halves of W are the pairs: (a, b) turns into (a cos - b sin, b cos + a sin).
        other = turned.roll(self.width // 2, -1)
        turned = torch.addcmul(turned * cos, other, sin * self.sign)
        query, key = torch.split(turned, [self.heads, self.key_heads], dim=1)
        return self.out(attend(query, key, value).transpose(1, 2).flatten(2))

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it is such a module, with plain matrices."""
        return type(module) is Attention and _has_plain_matrices(module)


class TransformersAttention(GroupedAttention):
    """The same behind the interface of transformers' modules; see `ATTENTION`."""

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
        """As transformers' modules: [B, A, H] from [B, A, H], and no weights."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.index)
            return attend_grouped(query, key, value, attention_mask, self.scaling)

        cos, sin = position_embeddings
        rotation = cos[:, None], sin[:, None]
        return super().__call__(hidden_states, rotation, attend), None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the module is of a class that is known, attends by sdpa, and is plain."""
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
    """What a norm calls by either name."""
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
