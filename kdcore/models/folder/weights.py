"""The weights in a model's folder, checked without reading them: what a load would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from kdcore.errors import UserError
from kdcore.models.folder.files import stored_folder
from kdcore.models.folder.shapes import unlike
from kdcore.specs.parts.fields import ModelSpec

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CURE = "copy or download the model again"


def are_here(spec: ModelSpec) -> bool:
    """Whether the weights of a model are on this machine."""
    folder = stored_folder(spec)
    try:
        return folder is not None and bool(weight_files(folder))
    except UserError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, from its index if it has one.

    Args:
        folder: Folder of the model.

    Returns:
        The files in the folder; empty if it has neither weights nor an index.

    Raises:
        UserError: The index is not valid, or names a file that is missing or outside the folder.
    """
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else []
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as fault:
        raise UserError(f"{index} is not an index of weights", _CURE) from fault
    if outside:
        raise UserError(
            f"{index} names '{outside[0]}', which is not a file of that folder",
            "use a model that keeps its weights in its own folder",
        )
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} does not exist, but the model's index names it", _CURE
            )
    return [folder / name for name in names]


def refuse_unusable_weights(folder: Path, model: Any) -> None:
    """Check that a model's weights can be loaded, by the headers of their files.

    Args:
        folder: Folder of the model.
        model: The model of its config, on any device.

    Raises:
        UserError: The weights are missing, only pickled, truncated, or have other shapes than the
            config's.
    """
    files = weight_files(folder)
    if not files:
        pickled = [file.name for pattern in _PICKLED for file in sorted(folder.glob(pattern))]
        raise UserError(
            f"{folder} has only pickled weights ({pickled[0]}), which kdcore does not read"
            if pickled
            else f"{folder} does not contain weights",
            f"use a model with safetensors weights ({SAFE_WEIGHTS_NAME})",
        )
    quantised = getattr(model.config, "quantization_config", None) is not None
    wanted: dict[str, list[int]] = {}
    if not quantised:  # such weights are packed, and their shapes are the method's
        wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                shapes = {name: opened.get_slice(name).get_shape() for name in names}
        except (OSError, SafetensorError) as fault:
            raise UserError(f"{file} is damaged or truncated: {fault}", _CURE) from fault
        if difference := unlike(shapes, wanted, model.config.to_dict()):
            raise UserError(
                f"{file}: {difference}", "use the config.json that belongs to these weights"
            )
