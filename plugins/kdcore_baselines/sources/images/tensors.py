"""Images as tensors: decoded values to normalised pixels, and the augmentation of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import Row, UserError
from kdcore_baselines.sources.components import AugmentParams, PixelParams


def pixels_of(image: Any, params: PixelParams, place: str) -> Tensor:
    """Convert an image to what a model reads.

    Args:
        image: An image of Pillow, or numbers of 0 to 255 [H, W], [H, W, C] or [C, H, W].
        params: The channels, the size and the normalisation.
        place: Name of the image in messages.

    Returns:
        [C, H, W] float32.

    Raises:
        UserError: These are not the numbers of an image.
    """
    if hasattr(image, "convert"):
        if image.mode.startswith(("I", "F")):  # Pillow would make all but the darkest pixels white
            raise UserError(
                f"{place}: the image has more than 8 bits for each pixel",
                "convert the images to 8 bits, scaled as the model needs them",
            )
        image = image.convert("RGB" if params.channels == 3 else "L")
    values = _channels_first(np.asarray(image), params.channels, place)
    pixels = torch.tensor(np.ascontiguousarray(values), dtype=torch.uint8)
    if params.size is not None:
        scaled = _resized(pixels.to(torch.float32) / 255, params.size, params.resample)
        pixels = (scaled * 255).round().to(torch.uint8)  # as image processors do
    return Normalised.of(params).restored(pixels)


def normalisation(params: PixelParams) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation of each channel."""
    count = params.channels
    return params.mean or [0.0] * count, params.std or [1.0] * count


def image_processor(params: PixelParams) -> dict[str, Any]:
    """The fields of transformers' CLIPImageProcessor that make the same of an image."""
    mean, std = normalisation(params)
    scales = params.size is not None
    fields: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": params.channels == 3,
        "do_resize": scales,
        "do_center_crop": scales,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    if scales:
        fields["size"] = {"shortest_edge": params.size}
        fields["crop_size"] = {"height": params.size, "width": params.size}
        fields["resample"] = {"bilinear": 2, "bicubic": 3}[params.resample]
    return fields


def _channels_first(values: Any, channels: int, place: str) -> Any:
    """The numbers of an image in the order [C, H, W]."""
    shape = values.shape
    if len(shape) == 2 and channels == 1:
        values = values[None]
    elif len(shape) == 3 and shape[-1] == channels:
        values = values.transpose(2, 0, 1)
    elif len(shape) != 3 or shape[0] != channels:
        raise UserError(
            f"{place}: an image with channels: {channels} cannot have the shape {list(shape)}",
            "set channels (1 for gray, 3 for colours), or name another column (image)",
        )
    whole = np.issubdtype(values.dtype, np.integer)
    if not whole or values.size == 0 or values.min() < 0 or values.max() > 255:
        raise UserError(
            f"{place}: the pixels must be whole numbers from 0 to 255",
            "convert the column to uint8, or name another column (image)",
        )
    return values


def _resized(pixels: Tensor, size: int, resample: str) -> Tensor:
    """Scale the shorter side to ``size``, and crop the longer one around its centre."""
    height, width = pixels.shape[1:]
    scale = size / min(height, width)
    target = [max(size, round(side * scale)) for side in (height, width)]
    if target != [height, width]:
        scaled = F.interpolate(pixels[None], target, mode=resample, antialias=True)
        pixels = scaled[0].clamp(0, 1)  # a bicubic filter overshoots
    top, left = ((side - size) // 2 for side in target)
    return pixels[:, top : top + size, left : left + size]


@dataclass(frozen=True, slots=True)
class Normalised:
    """Pixels of normalised images, which lie on disk as the bytes that they were made of.

    Attributes:
        mean: The mean of each channel, of values in [0, 1].
        std: The standard deviation of each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, params: PixelParams) -> Normalised:
        """The normalisation of params."""
        mean, std = normalisation(params)
        return cls(tuple(mean), tuple(std))

    def shrink(self, row: Row) -> Row:
        """See `kdcore.data.source.Compact`."""
        mean, std = self._tensors()
        values = ((row.inputs["pixel_values"] * std + mean) * 255).round().to(torch.uint8)
        return replace(row, inputs={**row.inputs, "pixel_values": values})

    def restore(self, row: Row) -> Row:
        """See `kdcore.data.source.Compact`."""
        pixels = self.restored(row.inputs["pixel_values"])
        return replace(row, inputs={**row.inputs, "pixel_values": pixels})

    def restored(self, values: Tensor) -> Tensor:
        """Pixels [C, H, W] uint8 as float32: ``(values / 255 - mean) / std``."""
        mean, std = self._tensors()
        return (values.to(torch.float32) / 255 - mean) / std

    def _tensors(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True, slots=True)
class CropAndFlip:
    """Random crops of images with a black border, and mirror images.

    Attributes:
        padding: Width of the border, and so the largest shift.
        flip: Whether half of the views are mirror images.
        black: The normalised value of a black pixel in each channel.
    """

    padding: int
    flip: bool
    black: tuple[float, ...]

    @classmethod
    def of(
        cls, params: AugmentParams | None, mean: Sequence[float], std: Sequence[float]
    ) -> CropAndFlip | None:
        """The augmentation of params, for images with this normalisation; None without any."""
        if params is None:
            return None
        black = tuple(-m / s for m, s in zip(mean, std, strict=True))
        return cls(params.crop_padding, params.flip, black)

    def __call__(self, row: Row, generator: torch.Generator) -> Row:
        pixels, border = row.inputs["pixel_values"], self.padding
        height, width = pixels.shape[1:]
        top, left = torch.randint(2 * border + 1, (2,), generator=generator).tolist()
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        if border:
            black = pixels.new_tensor(self.black)[:, None, None]
            whole = black.repeat(1, height + 2 * border, width + 2 * border)
            whole[:, border : border + height, border : border + width] = pixels
            pixels = whole[:, top : top + height, left : left + width]
        if self.flip and mirrored:
            pixels = pixels.flip(-1)
        return replace(row, inputs={**row.inputs, "pixel_values": pixels.contiguous()})
