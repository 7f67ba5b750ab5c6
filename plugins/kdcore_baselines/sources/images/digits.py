"""Source of the 8x8 images of handwritten digits in scikit-learn: a real task of seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcore import BuildContext, Row
from kdcore.components.optional_packages import import_early, optional_package
from kdcore_baselines.sources.components import DigitsParams
from kdcore_baselines.sources.images.tensors import CropAndFlip
from kdcore_baselines.sources.parts import stratified

import_early("sklearn.datasets")

SPLITS = {"train": (0.0, 0.5), "validation": (0.5, 0.7), "test": (0.7, 1.0)}
"""Interval of each class's rows in each split, by `stratified` with seed 0."""


@dataclass(frozen=True, slots=True)
class Digit:
    """One image.

    Attributes:
        id: Name of the image in messages.
        place: Index of the image in scikit-learn's data set.
        label: Digit in the image.
    """

    id: str
    place: int
    label: int


class DigitsSource:
    """Source of 8x8 images of handwritten digits; its ``classes`` are the digits."""

    model_class = "AutoModelForImageClassification"
    classes = tuple("0123456789")

    def __init__(self, params: DigitsParams, context: BuildContext) -> None:
        self.params = params
        self._images, self._labels = _shipped()
        self.augmentation = CropAndFlip.of(params.augment, [0.0], [1.0])

    def read(self) -> list[Digit]:
        chosen = stratified(self._labels, *SPLITS[self.params.split])
        return [Digit(f"digit {i}", i, self._labels[i]) for i in chosen[: self.params.limit]]

    def encode(self, example: Digit, tokenizer: Any, max_length: int) -> Row:
        return Row(
            inputs={"pixel_values": self._images[example.place]},
            labels=torch.tensor([example.label]),
            mask=torch.tensor([True]),
            id=example.id,
        )


def _shipped() -> tuple[Tensor, list[int]]:
    """Load all images [1797, 1, 8, 8] in [0, 1] and their labels."""
    library: Any = optional_package(
        "sklearn.datasets", "kdcore[images]", "the source digits", package="scikit-learn"
    )
    shipped = library.load_digits()
    images = torch.from_numpy(shipped.images).float() / 16
    return images[:, None], shipped.target.tolist()
