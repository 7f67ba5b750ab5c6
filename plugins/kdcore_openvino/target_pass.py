"""The pass of a transformers model as a function of tensors, without code for any family.

The model gets a 4D mask, position ids and a cache of given keys and values.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kdcore import UserError
from kdcore.decoding.engines.cache import KVCache
from kdcore.decoding.layers.attention import Masks, TreeAttention
from kdcore.models.anatomy import layer_count
from kdcore.models.features import FeatureTap, refuse_hooks
from kdcore.models.transformers_versions import cache_argument

BRANCHING = ("dynamic", "longrope")
"""Rotary positions whose factors depend on the longest row: a trace has those of one length."""
CONTENTS = ("_parameters", "_buffers", "_modules", "_output_capturing_hooks_installed")


class TargetPass:
    """A `kdcore.decoding.engines.protocols.TraceablePass` of a target.

    Its inputs are tokens [B, A], positions [B, A], logits_of [L] and mask.KIND [B, 1, A, S + A] for
    each type of layers; its outputs are logits [B, L, V] and each hidden.N [B, A, H].

    Args:
        target: The model in eval mode, on the CPU.

    Raises:
        UserError: The model does not accept a tree's mask.
    """

    def __init__(self, target: PreTrainedModel) -> None:
        self.target = target
        self.kinds = TreeAttention(target).kinds
        cache = KVCache()
        with torch.no_grad():
            one = torch.ones(1, 1, dtype=torch.int64)
            target(input_ids=one, use_cache=True, **{cache_argument(target): cache})
        pairs = zip(cache.keys, cache.values, strict=True)
        self.sizes = [(each.shape[1], each.shape[3]) for pair in pairs for each in pair]

    @property
    def facts(self) -> Any:
        """The class, config and settings of the modules.

        Raises:
            UserError: A trace would not follow the model.
        """
        _refuse_what_a_trace_misses(self.target)
        config = self.target.config.to_dict()
        config.pop("_name_or_path", None)
        attention = self.target.config._attn_implementation
        modules = [
            [name, type(each).__qualname__, _settings(each)]
            for name, each in self.target.named_modules()
        ]
        return json.dumps([config, attention, modules], sort_keys=True, default=str)

    def weights(self) -> Mapping[str, Tensor]:
        """The parameters and buffers, shared ones once."""
        return dict(self.target.named_parameters()) | dict(self.target.named_buffers())

    def example(self, rows: int, count: int, slots: int) -> dict[str, Tensor]:
        """Constant inputs; see `kdcore.decoding.engines.protocols.TraceablePass.example`."""
        return {
            "tokens": torch.ones(rows, count, dtype=torch.int64),
            "positions": torch.arange(slots, slots + count).repeat(rows, 1),
            "logits_of": torch.arange(count),
        } | {f"mask.{kind}": torch.zeros(rows, 1, count, slots + count) for kind in self.kinds}

    def module(self, float32: bool = True) -> nn.Module:
        """The pass of the model, or of a copy of it in float32."""
        single: Any = self.target
        if float32 and single.dtype != torch.float32:
            single = copy.deepcopy(single).float()
        return _Module(single)


class _Module(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.attention = TreeAttention(model)
        self.tap = FeatureTap(model, tuple(range(layer_count(model) + 1)))

    def forward(
        self, given: Mapping[str, Tensor], past: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        cache = TracedCache(past)
        masks = {kind: given[f"mask.{kind}"] for kind in self.attention.kinds}
        by_kind: Masks = masks
        if self.attention.layer_types is None:
            (by_kind,) = masks.values()
        with self.tap.listening() as heard:
            output = self.model(
                input_ids=given["tokens"],
                position_ids=given["positions"],
                attention_mask=by_kind,
                use_cache=True,
                logits_to_keep=given["logits_of"],
                **{cache_argument(self.model): cache},
            )
        states = {f"hidden.{layer}": heard[layer] for layer in self.tap.layers}
        return {"logits": output.logits} | states, cache.tensors()


class TracedCache(Cache):
    """A cache of given keys and values, which a pass appends to by copies.

    Args:
        past: The keys [B, heads, S, width] of the first layer, its values, and so on.
    """

    def __init__(self, past: Sequence[Tensor]) -> None:
        super().__init__(layers=[])
        self.keys, self.values = list(past[0::2]), list(past[1::2])

    def tensors(self) -> list[Tensor]:
        """The keys and values after the pass, in the order of ``past``."""
        pairs = zip(self.keys, self.values, strict=True)
        return [each for pair in pairs for each in pair]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys[layer_idx] = torch.cat([self.keys[layer_idx], key_states], 2)
        self.values[layer_idx] = torch.cat([self.values[layer_idx], value_states], 2)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.keys[layer_idx].shape[2]


def _refuse_what_a_trace_misses(target: PreTrainedModel) -> None:
    name = type(target).__name__
    rope = getattr(target.config.get_text_config(), "rope_parameters", None) or {}
    parts = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    for part in parts:
        if part.get("rope_type") in BRANCHING:
            raise UserError(
                f"openvino cannot run {name}: its rotary positions "
                f"({part['rope_type']}) depend on the longest row",
                "set the engine to torch",
            )
    refuse_hooks(target, "openvino")


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain values among a module's attributes, e.g. the scale and the state of an adapter."""
    own = {name: each for name, each in vars(module).items() if name not in CONTENTS}
    del own["training"]
    return {name: each for name, each in own.items() if _is_plain(each) and each}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)
