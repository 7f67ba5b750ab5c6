"""Labelled images: columns of every form, their normalisation, and views that training sees."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, List, Value
from pydantic import ValidationError

from kdcore.data.rows import digest_of, encode_rows, row_keys
from kdcore.data.store import row_key
from kdcore.errors import UserError
from kdcore.models.loading.load import NoTokenizer
from kdcore.runs.progress import Silent
from kdcore.testing.source import SourceSuite
from kdcore_baselines.sources.images.tensors import CropAndFlip, _resized
from tests.plugins.sources.test_hub_datasets import source

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), np.uint8)
LABELS = [0, 1, 0, 1, 1]
NUMBERS = {"image": Array3D((6, 6, 3), "uint8"), "label": ClassLabel(names=["cat", "dog"])}


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images as numbers, which nothing has to decode."""
    path = tmp_path_factory.mktemp("numbers") / "rows.parquet"
    rows = {"image": list(PIXELS), "label": LABELS}
    Dataset.from_dict(rows, features=Features(NUMBERS)).to_parquet(path)
    return path


class TestImageDataset(SourceSuite):
    name = "image_dataset"

    @pytest.fixture(autouse=True)
    def _data(self, numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "params", MappingProxyType({"path": str(numbers)}))


def rows_of(path: Path, **params: Any) -> list[Any]:
    images = source("image_dataset", path=path, **params)
    return [images.encode(example, None, 1) for example in images.read()]


def png(pixels: Any) -> bytes:
    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_the_pixels_are_normalised_by_channel(numbers: Path) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    rows = rows_of(numbers, mean=mean, std=std)
    assert [row.labels.tolist() for row in rows] == [[label] for label in LABELS]
    for row, pixels in zip(rows, PIXELS, strict=True):
        wanted = (pixels.astype(np.float64) / 255 - mean) / std
        found = row.inputs["pixel_values"]
        assert found.dtype == torch.float32 and found.shape == (3, 6, 6)
        np.testing.assert_allclose(found.numpy(), wanted.transpose(2, 0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.needs("Pillow")
@pytest.mark.parametrize("form", ["image", "bytes", "binary", "saved", "folder"])
def test_images_of_every_form_are_the_same_rows(form: str, numbers: Path, tmp_path: Path) -> None:
    encoded = [png(pixels) for pixels in PIXELS]
    path, params = tmp_path / "rows.parquet", {}
    names = {"label": ClassLabel(names=["cat", "dog"])}
    if form == "folder":
        for number, (data, label) in enumerate(zip(encoded, LABELS, strict=True)):
            place = tmp_path / "all" / ["cat", "dog"][label] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        path = tmp_path / "all"
    else:
        struct = [{"bytes": data, "path": None} for data in encoded]
        said = {
            "image": (Image(), struct),
            "saved": (Image(), struct),
            "bytes": ({"bytes": Value("binary"), "path": Value("string")}, struct),
            "binary": (Value("binary"), encoded),
        }
        kind, column = said[form]
        features = Features({"img": kind, **names})
        made = Dataset.from_dict({"img": column, "label": LABELS}, features=features)
        params = {"image": "img"}
        if form == "saved":
            path = tmp_path / "saved"
            made.save_to_disk(path)
        else:
            made.to_parquet(path)
    found, wanted = rows_of(path, **params), rows_of(numbers)
    ours = {row.inputs["pixel_values"].numpy().tobytes(): row.labels.tolist() for row in wanted}
    theirs = {row.inputs["pixel_values"].numpy().tobytes(): row.labels.tolist() for row in found}
    assert ours == theirs and len(ours) == len(LABELS)


@pytest.mark.needs("Pillow")
def test_a_gray_image_may_have_three_channels_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    data = [png(PIXELS[0, :, :, 0]), b"no image", png(PIXELS[0, :, :, 0].astype(np.uint16) * 256)]
    features = Features({"image": Value("binary"), "label": Value("int64")})
    rows = Dataset.from_dict({"image": data, "label": [0, 1, 1]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    images = source("image_dataset", path=tmp_path / "rows.parquet")
    first, second, third = images.read()
    pixels = images.encode(first, None, 1).inputs["pixel_values"]
    assert pixels.shape == (3, 6, 6) and torch.equal(pixels[0], pixels[2])
    with pytest.raises(UserError, match=r"rows\.parquet:2: the image cannot be read"):
        images.encode(second, None, 1)
    with pytest.raises(UserError, match=r"rows\.parquet:3: the image has more than 8 bits"):
        images.encode(third, None, 1)


def test_the_shorter_side_is_scaled_and_the_longer_one_cropped() -> None:
    wide = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_resized(wide, 8, "bilinear"), wide[:, :, 2:10])
    # half the size: each pixel is the mean of 4 x 4 with the weights of a triangle
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    small = _resized(wide, 4, "bilinear")
    assert small.shape == (3, 4, 4)
    around = wide[:, 1:5, 3:7].double()
    wanted = torch.einsum("chw,h,w->c", around, weights, weights)
    torch.testing.assert_close(small[:, 1, 1].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "params", "cause"),
    [
        ((6, 6, 2), {}, "an image with channels: 3 cannot have the shape [6, 6, 2]"),
        ((6, 6, 3), {"channels": 1}, "an image with channels: 1 cannot have the shape [6, 6, 3]"),
    ],
)
def test_numbers_that_are_no_image(
    shape: tuple[int, ...], params: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    features = Features({"image": Array3D(shape, "uint8"), "label": Value("int64")})
    made = Dataset.from_dict({"image": [np.zeros(shape)], "label": [3]}, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError) as raised:
        rows_of(tmp_path / "rows.parquet", **params)
    assert raised.value.cause == f"rows.parquet:1: {cause}"


def test_images_of_two_sizes_need_a_size(tmp_path: Path) -> None:
    gray = [np.zeros((4, 4)).tolist(), np.zeros((6, 4)).tolist()]
    features = Features({"image": List(List(Value("uint8"))), "label": Value("int64")})
    made = Dataset.from_dict({"image": gray, "label": [0, 1]}, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError) as raised:
        rows_of(tmp_path / "rows.parquet", channels=1)
    assert "the image has 6 x 4 pixels, and the first one 4 x 4" in raised.value.cause
    sizes = [row.inputs["pixel_values"].shape for row in rows_of(tmp_path, channels=1, size=5)]
    assert sizes == [(1, 5, 5)] * 2


def test_several_sources_keep_their_own_images(numbers: Path, tmp_path: Path) -> None:
    rows = {"image": list(255 - PIXELS), "label": LABELS}
    Dataset.from_dict(rows, features=Features(NUMBERS)).to_parquet(tmp_path / "rows.parquet")
    paths = [str(numbers), str(tmp_path / "rows.parquet")]
    joined = source("several", sources=[{"name": "image_dataset", "path": p} for p in paths])
    found = [joined.encode(example, None, 1) for example in joined.read()]
    wanted = rows_of(numbers) + rows_of(tmp_path / "rows.parquet")
    assert len(found) == 10 and len({row.id for row in found}) == 10
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.inputs["pixel_values"], theirs.inputs["pixel_values"])


def test_rows_are_encoded_once_whatever_the_augmentation(numbers: Path) -> None:
    plain = source("image_dataset", path=numbers)
    augmented = source("image_dataset", path=numbers, augment={"flip": True})
    rows, _ = encode_rows(plain, NoTokenizer(), 1, Silent())
    again, _ = encode_rows(augmented, NoTokenizer(), 1, Silent())
    small = source("image_dataset", path=numbers, size=4)
    other, _ = encode_rows(small, NoTokenizer(), 1, Silent())
    assert rows.folder == again.folder != other.folder  # type: ignore[attr-defined]
    wanted = rows_of(numbers)[3]
    assert torch.equal(rows[3].inputs["pixel_values"], wanted.inputs["pixel_values"])


def test_images_lie_on_disk_as_bytes_and_are_read_to_the_bit(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    features = Features({"image": Array3D((16, 16, 3), "uint8"), "label": Value("int64")})
    made = Dataset.from_dict({"image": [every, every[::-1]], "label": [0, 1]}, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    for mean, std in (([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0, 0, 1], [1, 9, 0.01])):
        params = {"path": tmp_path / "rows.parquet", "mean": mean, "std": std}
        images = source("image_dataset", **params)
        rows, _ = encode_rows(images, NoTokenizer(), 1, Silent())
        assert rows._batch(0).column("input pixel_values").values.type == "uint8"  # type: ignore[attr-defined]
        for found, wanted in zip(rows, rows_of(**params), strict=True):
            assert torch.equal(found.inputs["pixel_values"], wanted.inputs["pixel_values"])
        assert list(row_keys(rows)) == [row_key(each) for each in rows_of(**params)]
        assert digest_of(rows) == digest_of(rows_of(**params))


def test_a_view_is_a_crop_of_the_image_with_a_black_border_or_its_mirror(numbers: Path) -> None:
    mean, std, border = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 2
    augment = {"crop_padding": border, "flip": True}
    images = source("image_dataset", path=numbers, mean=mean, std=std, augment=augment)
    row = images.encode(images.read()[0], None, 1)
    shown = np.pad(PIXELS[0], ((border, border), (border, border), (0, 0)))
    crops = {
        (top, left, flip): ((crop[:, ::-1] if flip else crop) / 255 - mean) / std
        for top in range(5)
        for left in range(5)
        for crop in [shown[top : top + 6, left : left + 6].astype(np.float64)]
        for flip in (False, True)
    }
    seen = {}
    for seed in range(400):
        view = images.augmentation(row, torch.Generator().manual_seed(seed))
        assert (view.id, view.labels, view.mask) == (row.id, row.labels, row.mask)
        pixels = view.inputs["pixel_values"].numpy().transpose(1, 2, 0)
        (which,) = [name for name, crop in crops.items() if np.allclose(pixels, crop, atol=1e-5)]
        seen[which] = seen.get(which, 0) + 1
    assert len(seen) == 50 and max(seen.values()) < 30, "each crop is about as likely"
    still = CropAndFlip(0, False, (0.0, 0.0, 0.0))
    same = still(replace(row), torch.Generator().manual_seed(1))
    assert torch.equal(same.inputs["pixel_values"], row.inputs["pixel_values"])


def test_params_that_contradict_each_other(numbers: Path) -> None:
    wrongs = {"mean": [0.5]}, {"std": [0.2, 0.2]}, {"std": [0, 1, 1]}, {"mean": [127, 0, 0]}
    for wrong in wrongs:
        with pytest.raises(ValidationError):
            source("image_dataset", path=numbers, **wrong)


@pytest.mark.needs("Pillow")
def test_the_first_images_of_a_stream_are_those_of_the_data(tmp_path: Path) -> None:
    struct = [{"bytes": png(pixels), "path": None} for pixels in PIXELS]
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    made = Dataset.from_dict({"image": struct, "label": LABELS}, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "rows.parquet"
    found, wanted = rows_of(path, streaming=True, limit=3), rows_of(path, limit=3)
    assert len(found) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.labels.equal(theirs.labels) and ours.id == theirs.id
        assert torch.equal(ours.inputs["pixel_values"], theirs.inputs["pixel_values"])


def test_without_pillow_the_cure_is_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features({"image": Value("binary"), "label": Value("int64")})
    made = Dataset.from_dict({"image": [b""], "label": [0]}, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr("datasets.config.PIL_AVAILABLE", False)
    with pytest.raises(UserError, match="package pillow") as raised:
        source("image_dataset", path=tmp_path / "rows.parquet")
    assert "kdcore[datasets]" in raised.value.cure
