"""A faster forward pass over a few tokens on a CPU, with copies of the weights.

Linear layers use packed weights, and the modules that `kdcore.decoding.layers.fused_parts` supports
use fewer operations, all in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from kdcore.decoding.layers.fused_parts import (
    GatedMLP,
    GroupedAttention,
    Part,
    RMSNorm,
    TransformersAttention,
)
from kdcore.decoding.layers.packed_weights import PackedWeights, is_plain, is_to_be_widened, version

SHARE = 0.5
"""Maximum fraction of the free memory for the copies of a model's weights."""
TOLERANCE = 1e-4
"""Maximum difference between a part and its module, relative to the largest float32 value."""

Make = Callable[[Any], Part]

PARTS: tuple[tuple[Callable[[nn.Module], bool], Make], ...] = (
    (GatedMLP.fits, GatedMLP),
    (GroupedAttention.fits, GroupedAttention),
    (TransformersAttention.fits, TransformersAttention),
    (RMSNorm.fits, RMSNorm),
    (RMSNorm.fits, partial(RMSNorm, more=1.0)),  # Gemma stores the weight minus one
)
"""Replacements of modules, each with the predicate that selects modules for a trial."""


class CpuPass:
    """A context in which a model computes with replacements of its modules.

    It supports float32 models, and bfloat16 models on a processor without bfloat16 products. For
    the latter, only the weights are bfloat16 and the rest of the pass is float32: rounding to 8
    bits in every layer would make a pass over one token differ from a pass over several.

    A model on another device does not change, nor one whose copies might exceed `SHARE` of the free
    memory. The copies are cached until the weights change.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        held = _copies.get(model)
        if held is None or not held.are_of(model):
            held = _Copies(model)
            if held.parts or held.others:
                _copies[model] = held
        self._held = held

    @property
    def parts(self) -> list[Part | PackedWeights]:
        """The replacements of the model's modules, in order."""
        return [part for _, part in self._held.parts]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Compute from the copies, without gradients, inside the context."""
        # A module that received its own forward meanwhile keeps it.
        swapped = [each for each in self._held.parts if "forward" not in each[0]]
        for attributes, part in swapped:
            attributes["forward"] = part
        for held, name, _, wide in self._held.others:
            held[name] = wide
        try:
            yield
        finally:
            for attributes, _ in swapped:
                del attributes["forward"]
            for held, name, tensor, _ in self._held.others:
                held[name] = tensor


class _Copies:
    """The replacements for a model, and float32 copies of its other bfloat16 tensors.

    It refers to attributes of the modules only, not to the model or its modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = _tensors(model)
        self.versions = [version(tensor) for tensor in self.tensors]
        self.parts: list[tuple[dict[str, Any], Part | PackedWeights]] = []
        self.others: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        if not _there_is_room(self.tensors):
            return
        found = dict(_parts_of(model, {}))
        self.parts = [(vars(module), part) for module, part in found.items()]
        inside = {id(each) for module in found for each in module.modules()}
        for module in model.modules():
            if id(module) not in inside:
                for held in (module._parameters, module._buffers):
                    self.others += [
                        (held, name, tensor, tensor.detach().float())
                        for name, tensor in held.items()
                        if tensor is not None and is_to_be_widened(tensor)
                    ]

    def are_of(self, model: nn.Module) -> bool:
        """Whether the model still has the same tensors with the same values."""
        tensors = _tensors(model)
        return len(tensors) == len(self.tensors) and all(
            new is old and version(new) == then
            for new, old, then in zip(tensors, self.tensors, self.versions, strict=True)
        )


_copies: WeakKeyDictionary[nn.Module, _Copies] = WeakKeyDictionary()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _there_is_room(tensors: list[Tensor]) -> bool:
    taken = 4 * sum(tensor.numel() for tensor in tensors)
    return bool(taken <= SHARE * psutil.virtual_memory().available)


def _parts_of(
    module: nn.Module, tried: dict[tuple[type, Make], bool]
) -> Iterator[tuple[nn.Module, Part | PackedWeights]]:
    """The outermost replaceable modules in this one, with their replacements."""
    part = _part(module, tried)
    if part is not None:
        yield module, part
        return
    for child in module.children():
        yield from _parts_of(child, tried)


@torch.no_grad()
def _part(module: nn.Module, tried: dict[tuple[type, Make], bool]) -> Part | PackedWeights | None:
    """The replacement of a module, or None; ``tried`` caches the trials by class."""
    if is_plain(module):
        return PackedWeights.of(module)
    for fits, make in PARTS:
        key = type(module), make
        if tried.get(key, True) and "forward" not in vars(module) and fits(module):
            part = make(module)
            if key not in tried:
                tried[key] = _agree(part, module)
            if tried[key]:
                return part
    return None


def _agree(part: Part, module: nn.Module) -> bool:
    """Whether the part gives the output of the module."""
    inputs = part.trial(torch.Generator().manual_seed(0))
    try:
        expected, found = copy.deepcopy(module).float()(*inputs), part(*inputs)
    except (TypeError, ValueError, RuntimeError):  # it has other arguments, or cannot be copied
        return False
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    error, size = (expected - found).abs().max(), expected.abs().max()
    return bool(error <= TOLERANCE * size)
