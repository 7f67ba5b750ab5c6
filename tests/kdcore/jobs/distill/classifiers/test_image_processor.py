"""The preprocessor_config.json of image models: compared with the data, saved with the student."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features
from PIL import Image
from transformers import AutoImageProcessor

from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.models.folder.image_processor import differences
from kdcore.runs.progress import Silent
from kdcore.specs.distill import DistillSpec
from kdcore_baselines.sources.components import ImageDatasetParams
from kdcore_baselines.sources.images.tensors import image_processor, pixels_of
from tests.kdcore.jobs.distill.classifiers.test_classifiers import LABELS_ALONE, RESNET

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 12, 9, 3), np.uint8)
HALF = [0.5, 0.5, 0.5]


def params(**given: Any) -> ImageDatasetParams:
    return ImageDatasetParams.model_validate({"path": "some/images", **given})


@pytest.mark.parametrize(
    "given",
    [
        {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        {"channels": 1, "mean": [0.2]},
        {"size": 6, "resample": "bicubic"},
    ],
)
def test_transformers_makes_of_an_image_what_a_model_was_trained_on(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    asked, image = params(**given), Image.fromarray(PIXELS[0])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(asked)))
    made = AutoImageProcessor.from_pretrained(tmp_path)
    theirs = made(image.convert("L" if asked.channels == 1 else "RGB"), return_tensors="pt")
    ours = pixels_of(image, asked, "image")
    # Pillow rounds scaled pixels to whole numbers
    rounded = 1e-6 if asked.size is None else 1.5 / 255
    torch.testing.assert_close(ours, theirs["pixel_values"][0], rtol=0, atol=rounded)


@pytest.mark.parametrize(
    ("theirs", "given", "found"),
    [
        ({"image_mean": HALF, "image_std": HALF}, {"mean": HALF, "std": HALF}, []),
        ({"image_mean": 0.5, "image_std": 0.5}, {"mean": HALF, "std": HALF}, []),
        ({"do_normalize": False, "image_mean": HALF}, {}, []),
        # pixels from -1 to 1, which a few models get from the rescaling alone
        (
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
            {"mean": HALF, "std": HALF},
            [],
        ),
        (
            {"do_rescale": False, "image_mean": [127.5], "image_std": [255.0]},
            {},
            ["mean: [0.5] (here [0, 0, 0])"],
        ),
        ({"image_std": [0.5, 0.25, 0.5]}, {}, ["std: [0.5, 0.25, 0.5] (here [1, 1, 1])"]),
        (
            {"do_resize": True, "size": {"height": 8, "width": 8}, "resample": 3},
            {"size": 6},
            ["size: 8 (here 6)", "resample: bicubic (here bilinear)"],
        ),
        (
            {
                "do_resize": True,
                "size": {"shortest_edge": 8},
                "do_center_crop": True,
                "crop_size": 6,
            },
            {},
            ["size: 6 (here the images as they are)"],
        ),
    ],
)
def test_what_differs_is_told(
    theirs: dict[str, Any], given: dict[str, Any], found: list[str]
) -> None:
    assert list(differences(theirs, image_processor(params(**given)))) == found


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        yield


def test_a_run_compares_its_teacher_and_saves_the_students(tmp_path: Path) -> None:
    kinds = Features({"image": Array3D((12, 9, 3), "uint8"), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": list(PIXELS), "label": [0, 1] * 3}, features=kinds)
    rows.to_parquet(tmp_path / "rows.parquet")
    source = {"name": "image_dataset", "path": str(tmp_path / "rows.parquet"), "mean": HALF}

    def spec(run: str, **more: Any) -> DistillSpec:
        asked = {
            "run": str(tmp_path / run),
            "student": {"model": "new", "config": RESNET | {"num_channels": 3}},
            "data": {"train": source | more.pop("source", {})},
            "method": LABELS_ALONE,
            "training": {"batch_size": 3, "steps": 1},
        }
        return DistillSpec.model_validate(asked | more)

    folder = distill(spec("first")).path("model")
    made = AutoImageProcessor.from_pretrained(folder)
    theirs = made(Image.fromarray(PIXELS[1]), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs, pixels_of(PIXELS[1], params(mean=HALF), "image"))

    teacher, notes = {"teacher": {"model": str(folder)}}, Notes()
    distill(spec("same", **teacher), progress=notes)
    assert not [line for line in notes.lines if "preprocessor_config" in line]
    other = spec("other", source={"mean": None}, **teacher)
    distill(other, progress=notes)
    (warning,) = (line for line in notes.lines if "preprocessor_config" in line)
    said = (
        "data.train makes other images than the teacher's preprocessor_config.json says, which "
        "the teacher was trained on: set mean: [0.5, 0.5, 0.5] (here [0, 0, 0])"
    )
    assert warning == f"warning: {said}" and said in preflight(other).warnings
