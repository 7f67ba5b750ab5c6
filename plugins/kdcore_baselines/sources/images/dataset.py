"""The data source of labelled images that Hugging Face datasets loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcore import BuildContext, Row
from kdcore.components.optional_packages import import_early, missing_package
from kdcore.errors import UserError, first_line
from kdcore_baselines.sources.components import ImageDatasetParams
from kdcore_baselines.sources.hub.sources import LabelledDatasetSource, fingerprint
from kdcore_baselines.sources.images.tensors import (
    CropAndFlip,
    Normalised,
    image_processor,
    normalisation,
    pixels_of,
)

datasets: Any = import_early("datasets")


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """Image with its classes, decoded when its row is encoded.

    Attributes:
        id: Name of the row in messages.
        number: Number of the image in the data.
        labels: Indices of its classes.
        data: Fingerprint of the data.
        images: The images.
    """

    id: str
    number: int
    labels: tuple[int, ...]
    data: str | None
    images: ImageDatasetSource = field(compare=False, repr=False)

    def pixels(self) -> Tensor:
        """Read the image: [C, H, W] float32. Raises UserError if it cannot be read."""
        return self.images.pixels(self.number)


@dataclass(frozen=True, slots=True)
class StreamedImage:
    """Image of a stream with its classes, decoded when its row is encoded.

    Attributes:
        id: Name of the row in messages.
        labels: Indices of its classes.
        digest: Digest of the stored image, which tells it from others.
        stored: The image as the data has it: encoded, or as numbers.
        images: The images.
    """

    id: str
    labels: tuple[int, ...]
    digest: str
    stored: Any = field(compare=False, repr=False)
    images: ImageDatasetSource = field(compare=False, repr=False)

    def pixels(self) -> Tensor:
        """Read the image: [C, H, W] float32. Raises UserError if it cannot be read."""
        return self.images.sized(self.id, lambda: self.images.decoded(self.stored))


class ImageDatasetSource(LabelledDatasetSource):
    """Source of labelled images; its ``classes`` are the names that the column declares."""

    model_class = "AutoModelForImageClassification"
    content = "image"

    def __init__(self, params: ImageDatasetParams, context: BuildContext) -> None:
        super().__init__(params, context)
        self.augmentation = CropAndFlip.of(params.augment, *normalisation(params))
        self.image_processor = image_processor(params)
        self.compact = Normalised.of(params)
        self._images = _decoding(self._data, params)

    def fingerprint(self) -> str | None:
        if self.params.streaming:
            return None
        plain = self.params.model_copy(update={"augment": None})  # which changes no stored row
        told = fingerprint(plain, self._data, self._of_classes())
        return None if told is None else json.dumps([told, torch.__version__])

    def contents(self, rows: Sequence[int]) -> Iterator[tuple[str, int]]:
        for row in rows:
            yield self.place(row), row

    def example(self, place: str, content: int, labels: tuple[int, ...]) -> LabelledImage:
        return LabelledImage(place, content, labels, self._data._fingerprint, self)

    def example_of(self, place: str, content: Any, labels: tuple[int, ...]) -> StreamedImage:
        told = content["bytes"] if isinstance(content, dict) else content
        written = told if isinstance(told, bytes) else repr(content).encode()
        digest = hashlib.sha256(written).hexdigest()
        return StreamedImage(place, labels, digest, content, self)

    def encode(
        self, example: LabelledImage | StreamedImage, tokenizer: Any, max_length: int
    ) -> Row:
        return self.row(example, {"pixel_values": example.pixels()})

    def pixels(self, number: int) -> Tensor:
        """Read an image.

        Args:
            number: Number of the image in the data.

        Returns:
            [C, H, W] float32, normalised.

        Raises:
            UserError: It cannot be read, or has another size than the first image.
        """
        return self.sized(self.place(number), lambda: self._images[number][self.params.image])

    def sized(self, place: str, read: Callable[[], Any]) -> Tensor:
        """Make pixels of an image, see `pixels`.

        Args:
            place: Name of the row in messages.
            read: Reads the image.

        Returns:
            [C, H, W] float32, normalised.

        Raises:
            UserError: As for `pixels`.
        """
        pixels = self._pixels(place, read)
        if pixels.shape[1:] != self.size:
            height, width = pixels.shape[1:]
            raise UserError(
                f"{place}: the image has {height} x {width} pixels, and the first "
                f"one {self.size[0]} x {self.size[1]}",
                "set size, to which all images are scaled",
            )
        return pixels

    @cached_property
    def size(self) -> tuple[int, ...]:
        """Height and width of the first image."""
        first = self._pixels(self.place(0), lambda: self._images[0][self.params.image])
        return tuple(first.shape[1:])

    def decoded(self, stored: Any) -> Any:
        """The image of what a stream has in its column: encoded images, or numbers."""
        if self._images.format["type"] == "numpy":
            return np.asarray(stored)
        if not isinstance(stored, dict):
            told = "bytes" if isinstance(stored, bytes) else "path"
            stored = {"bytes": None, "path": None, told: stored}
        return datasets.Image().decode_example(stored)

    def _pixels(self, place: str, read: Callable[[], Any]) -> Tensor:
        try:
            image = read()
        except Exception as fault:  # Pillow has an error for each kind of damage
            raise UserError(
                f"{place}: the image cannot be read: {first_line(fault)}",
                "write the image again, or remove the row",
            ) from fault
        if image is None:
            raise UserError(f"{place} has no image", "add the image, or remove the row")
        return pixels_of(image, self.params, place)

    def _encoded(self, data: Any) -> Any:
        column = self.params.image
        decoded = isinstance((data.features or {}).get(column), datasets.Image)
        return data.cast_column(column, datasets.Image(decode=False)) if decoded else data

    def _check(self, row: dict[str, Any], place: str) -> None:
        """Images are checked when they are decoded."""

    def _checked_columns(self, data: Any) -> Any:
        return data.select_columns([self.params.label])


def _decoding(data: Any, params: ImageDatasetParams) -> Any:
    """The column of images, which are decoded as they are read."""
    images = data.select_columns([params.image])
    kind = images.features[params.image]
    encoded = isinstance(kind, dict) or getattr(kind, "dtype", None) in ("binary", "string")
    if not encoded and not isinstance(kind, datasets.Image):
        return images.with_format("numpy")  # numbers
    if not datasets.config.PIL_AVAILABLE:
        raise missing_package("the source image_dataset", "pillow", "kdcore[datasets]")
    return images.cast_column(params.image, datasets.Image())
