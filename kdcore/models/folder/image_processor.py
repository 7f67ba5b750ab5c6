"""How images become what a model reads: the preprocessor_config.json beside its weights.

Sources of images describe themselves by the same fields (``image_processor``): those of
transformers' CLIPImageProcessor, which scales the shorter side, crops around the centre, rescales
and normalises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.image_processing_base import ImageProcessingMixin

from kdcore.runs.whole_files import write_text
from kdcore.specs.parts.fields import ModelSpec

FILE = "preprocessor_config.json"
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Number of a filter of Pillow -> its name."""


def read_image_processor(model: ModelSpec) -> dict[str, Any] | None:
    """Read how a model's images were made.

    Args:
        model: The model.

    Returns:
        The fields of the file; None if the model has no such file, or it cannot be read.
    """
    place: dict[str, Any] = {"revision": model.revision, "subfolder": model.subfolder or ""}
    given = {name: value for name, value in place.items() if value}
    try:
        fields, _ = ImageProcessingMixin.get_image_processor_dict(model.model, **given)
    except (OSError, ValueError):
        return None
    return dict(fields)


def write_image_processor(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write how a model's images are made, for ``AutoImageProcessor``.

    Args:
        folder: The folder of the model.
        fields: The fields of the file.
    """
    write_text(folder / FILE, json.dumps(dict(fields), indent=2) + "\n")


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Compare what two descriptions make of an image.

    Args:
        theirs: The fields of a model's file.
        ours: The fields of a source.

    Yields:
        What differs, with the parameter of a source that gives the model's images.
    """
    for name, place in (("mean", 0), ("std", 1)):
        wanted, given = (_normalised(fields)[place] for fields in (theirs, ours))
        if not _near(wanted, given):
            yield f"{name}: {_numbers(wanted)} (here {_numbers(given)})"
    wanted_size, size = _size(theirs), _size(ours)
    if wanted_size is not None and wanted_size != size:
        yield f"size: {wanted_size} (here {'the images as they are' if size is None else size})"
    wanted_filter, own = (_FILTERS.get(each.get("resample", 2)) for each in (theirs, ours))
    if None not in (wanted_size, size) and wanted_filter != own:
        yield f"resample: {wanted_filter} (here {own})"


def _normalised(fields: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation for pixels in [0, 1]."""
    scale = 255 * fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 255.0
    normalises = fields.get("do_normalize", True)
    mean, std = (fields.get(f"image_{name}") if normalises else None for name in ("mean", "std"))
    return [each / scale for each in _listed(mean, 0.0)], [
        each / scale for each in _listed(std, 1.0)
    ]


def _listed(value: Any, default: float) -> Sequence[float]:
    """A number for each channel, or one for all."""
    if value is None:
        return [default]
    return value if isinstance(value, list | tuple) else [value]


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two lists, of which one may have a number for all channels, say the same."""
    longest = max(len(one), len(other))
    pairs = zip(
        *(list(e) * longest if len(e) == 1 else list(e) for e in (one, other)), strict=False
    )
    return all(math.isclose(a, b, abs_tol=2e-3) for a, b in pairs)


def _size(fields: Mapping[str, Any]) -> int | str | None:
    """The height and width that a model reads; None if images stay as they are."""
    crops, scales = fields.get("do_center_crop", False), fields.get("do_resize", False)
    size = fields.get("crop_size") if crops else fields.get("size") if scales else None
    if not isinstance(size, Mapping):
        return size
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    height, width = size.get("height"), size.get("width")
    return height if height == width else f"{height} x {width}"


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{each:.4g}" for each in values) + "]"
