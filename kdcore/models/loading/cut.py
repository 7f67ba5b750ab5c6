"""A student cut from its teacher: it keeps some decoder layers and everything else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kdcore.errors import UserError
from kdcore.models.anatomy import layers_of


def cut_layers(model: Any, layers: Sequence[int]) -> Any:
    """Copy a model with only some of its layers; the model itself does not change.

    Args:
        model: A causal language model.
        layers: Indices in increasing order; negative indices count from the end.

    Returns:
        The smaller model.

    Raises:
        UserError: The layers are out of range, repeated or not in increasing order, leave out all
            attention, or transformers cannot rebuild the smaller model from its config.
    """
    whole = layers_of(model)
    kept = kept_layers(layers, len(whole))
    copies: dict[int, Any] = {}
    part = nn.ModuleList(copy.deepcopy(whole[index], copies) for index in kept)
    copies[id(whole)] = part  # deepcopy takes the part in place of the whole list
    student = copy.deepcopy(model, copies)
    for place, layer in enumerate(part):
        module: Any
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    cut_config(student.config, kept)
    if _counts_tokens(model.config) and not _counts_tokens(student.config):
        raise UserError(
            f"layers {list(layers)} of {type(model).__name__} do not contain an attention layer, "
            "without which transformers cannot run a model of its family",
            "keep a layer of full attention too",
        )
    _check_rebuilds(student)
    return student


def sharing_layers(model: Any, layers: Sequence[int]) -> Any:
    """Make a model of some of another model's layers, which shares its weights.

    Args:
        model: A causal language model.
        layers: Indices in increasing order; negative indices count from the end.

    Returns:
        The smaller model, in eval mode.

    Raises:
        UserError: The layers are out of range, repeated or not in increasing order, or the model
            is not what transformers builds from its config: it has adapters or quantised weights.
    """
    whole = layers_of(model)
    kept = kept_layers(layers, len(whole))
    refusal = UserError(
        f"some layers of {type(model).__name__} cannot share its weights, which are not those that "
        "transformers builds from its config",
        "merge its adapters, and load it without quantization",
    )
    if not isinstance(model, PreTrainedModel):
        raise refusal
    config = copy.deepcopy(model.config)
    cut_config(config, kept)
    with torch.device("meta"):
        part: Any = type(model)(config)
    part.eval()
    (prefix,) = (f"{name}." for name, each in model.named_modules() if each is whole)
    own = _tensors(model)
    for name, each in _tensors(part).items():
        source = name
        if name.startswith(prefix):
            place, rest = name.removeprefix(prefix).split(".", 1)
            source = f"{prefix}{kept[int(place)]}.{rest}"
        if source not in own or own[source].shape != each.shape:
            raise refusal
        module, _, last = name.rpartition(".")
        setattr(part.get_submodule(module), last, own[source])
    return part


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model, shared ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def cut_config(config: Any, kept: Sequence[int]) -> None:
    """Change a config, in place, to that of the cut, including its per-layer lists.

    Args:
        config: The config of the whole model.
        kept: Indices of the kept layers, counted from the start.
    """
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

    Args:
        layers: Indices, of which negative ones count from the end.
        size: Number of layers of the model.

    Returns:
        The same layers as indices from 0 to ``size - 1``.

    Raises:
        UserError: An index is out of range, or the order is not strictly increasing.
    """
    wrong = [index for index in layers if not -size <= index < size]
    if wrong:
        raise UserError(
            f"layers {wrong} do not exist: the model has layers 0 to {size - 1}",
            f"use indices from 0 to {size - 1}, or from -{size} to -1; or remove layers, which "
            "keeps all of them",
        )
    kept = [index % size for index in layers]
    if not kept or any(left >= right for left, right in pairwise(kept)):
        raise UserError(
            f"layers {list(layers)} must be in increasing order without repeats",
            "use e.g. [0, 1, 4, -1]",
        )
    return kept


def _counts_tokens(config: Any) -> bool:
    """Whether the cache of a model knows its length, which layers of linear attention do not."""
    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError:
        return False
    return True


def _check_rebuilds(student: Any) -> None:
    """Check that the config alone describes the cut, e.g. which layers have experts."""
    with torch.device("meta"):
        rebuilt = type(student)(student.config)
    if _shapes(rebuilt) != _shapes(student):
        raise UserError(
            f"cannot cut {type(student).__name__} to these layers: a layer's index decides its "
            "type, and the indices would change",
            "keep layers whose new indices have the same type, or use a smaller model as the "
            "student",
        )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
