"""A model's pass over a few tokens on a CPU, computed from copies of its weights.

Its linear layers are computed from packed weights, and what `kdcore.decoding.layers.fused_parts`
knows by fewer operations, all in float32.
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
"""Of the memory that is free, what the copies of a model's weights may take."""
TOLERANCE = 1e-4
"""Of a module's largest value, by which its part may differ from it, in float32."""

Make = Callable[[Any], Part]

PARTS: tuple[tuple[Callable[[nn.Module], bool], Make], ...] = (
    (GatedMLP.fits, GatedMLP),
    (GroupedAttention.fits, GroupedAttention),
    (TransformersAttention.fits, TransformersAttention),
    (RMSNorm.fits, RMSNorm),
    (RMSNorm.fits, partial(RMSNorm, more=1.0)),  # as Gemma keeps its weights
)
"""What may stand in for a module, and what shows whether that is worth a trial."""


class CpuPass:
    """Swaps what a model computes with for as long as a pass lasts.

    Takes float32 models, and bfloat16 ones where the processor cannot multiply bfloat16 itself. Of
    those only the weights are bfloat16 then, and the rest of the pass is float32: what is rounded
    to 8 bits in every layer would not be the same in a pass over one token as in one over several.

    A model elsewhere than on a CPU is left alone, and one whose copies might take more than `SHARE`
    of the memory that is free. The copies are made once, and again when the weights have changed.
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
        """What stands in for modules of the model, in their order."""
        return [part for _, part in self._held.parts]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the model computes from the copies, without a gradient."""
        # One that was given a forward of its own meanwhile keeps it.
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
    """A model's parts, and whatever else it has in bfloat16, in float32.

    It does not refer to the model, nor to modules of it, only to their attributes.
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
        """Whether the model has the same tensors, and they the same values."""
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
    """The largest modules below this one, or itself, that something may stand in for."""
    part = _part(module, tried)
    if part is not None:
        yield module, part
        return
    for child in module.children():
        yield from _parts_of(child, tried)


@torch.no_grad()
def _part(module: nn.Module, tried: dict[tuple[type, Make], bool]) -> Part | PackedWeights | None:
    """tried: whether a part computes what modules of a class do."""
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
    """Whether the part computes what the module does."""
    inputs = part.trial(torch.Generator().manual_seed(0))
    try:
        expected, found = copy.deepcopy(module).float()(*inputs), part(*inputs)
    except (TypeError, ValueError, RuntimeError):  # it takes something else, or cannot be copied
        return False
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    error, size = (expected - found).abs().max(), expected.abs().max()
    return bool(error <= TOLERANCE * size)
