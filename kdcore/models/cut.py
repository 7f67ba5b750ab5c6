"""A student cut from its teacher: some of the decoder's layers, everything else whole."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from kdcore.errors import UserError


def cut_layers(model: Any, layers: Sequence[int]) -> Any:
    """A copy of the model that has only these layers; the model itself stays whole.

    layers: rising indices, negative ones from the end.
    Raises UserError for layers out of range, repeated or falling, and for an architecture whose
    cut transformers could not build again from the cut's config.
    """
    whole = _decoder_layers(model)
    kept = kept_layers(layers, len(whole))
    copies: dict[int, Any] = {}
    part = nn.ModuleList(copy.deepcopy(whole[index], copies) for index in kept)
    copies[id(whole)] = part  # the copy of the model meets the part where the whole was
    student = copy.deepcopy(model, copies)
    for place, layer in enumerate(part):
        module: Any
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    cut_config(student.config, kept)
    _check_rebuilds(student)
    return student


def cut_config(config: Any, kept: Sequence[int]) -> None:
    """Make a config that of the cut, with its lists of one entry per layer."""
    text = config.get_text_config(decoder=True)
    size = text.num_hidden_layers
    lists = {
        name: [value[index] for index in kept]
        for name, value in vars(text).items()
        if "layer" in name and isinstance(value, list) and len(value) == size
    }
    text.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(text, name, value)


def kept_layers(layers: Sequence[int], size: int) -> list[int]:
    """Layer indices counted from the start.

    Raises UserError when one is out of range, or they do not rise.
    """
    wrong = [index for index in layers if not -size <= index < size]
    if wrong:
        raise UserError(
            f"layers {wrong} do not exist: the model has {size}, 0 to {size - 1}",
            f"choose from 0 to {size - 1}, or from -{size} to -1",
        )
    kept = [index % size for index in layers]
    if not kept or any(left >= right for left, right in pairwise(kept)):
        raise UserError(
            f"layers {list(layers)} must rise and name each layer once", "e.g. [0, 1, 4, -1]"
        )
    return kept


def _decoder_layers(model: Any) -> nn.ModuleList:
    size = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == size:
            return module
    raise UserError(
        f"{type(model).__name__} keeps its layers in no list that can be cut",
        "name a smaller model as the student instead of cutting the teacher",
    )


def _check_rebuilds(student: Any) -> None:
    """Whether the config alone describes the cut, e.g. which layers are experts."""
    with torch.device("meta"):
        rebuilt = type(student)(student.config)
    if _shapes(rebuilt) != _shapes(student):
        raise UserError(
            f"{type(student).__name__} decides by a layer's place what it is made of, and "
            "these layers would change places",
            "keep layers whose places hold the same kind, or name a smaller model as the student",
        )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
