"""Digits, and parts of labelled rows that share none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdcore.errors import UserError
from kdcore.testing.source import SourceSuite
from kdcore_baselines.sources.components import DigitsParams, LabelledTextParams
from kdcore_baselines.sources.images.digits import SPLITS, DigitsSource
from kdcore_baselines.sources.labelled import LabelledTextSource
from kdcore_baselines.sources.parts import stratified

NO_CONTEXT: Any = None


class TestDigits(SourceSuite):
    name = "digits"


def of(split: Any, limit: int | None = None) -> DigitsSource:
    return DigitsSource(DigitsParams(split=split, limit=limit), NO_CONTEXT)


def test_each_image_is_in_one_split_and_each_split_has_each_digit() -> None:
    read = {split: of(split).read() for split in SPLITS}
    assert {split: len(rows) for split, rows in read.items()} == {
        "train": 896,
        "validation": 362,
        "test": 539,
    }
    places = [row.place for rows in read.values() for row in rows]
    assert sorted(places) == list(range(1797))
    for split, rows in read.items():
        counts = Counter(row.label for row in rows)
        assert max(counts.values()) - min(counts.values()) <= 4, split
    # the split is part of published figures: it may not change
    assert [row.place for row in of("test").read()[:5]] == FIRST_OF_TEST


FIRST_OF_TEST = [3, 8, 9, 11, 19]


def test_a_row_is_the_image_and_its_digit() -> None:
    from sklearn.datasets import load_digits

    source = of("validation", limit=3)
    assert len(source.read()) == 3 and source.classes == tuple("0123456789")
    for example in source.read():
        row = source.encode(example, None, 1)
        image = row.inputs["pixel_values"]
        assert image.shape == (1, 8, 8) and image.dtype == torch.float32
        shipped = load_digits()
        assert torch.equal(image[0] * 16, torch.from_numpy(shipped.images[example.place]).float())
        assert row.labels.tolist() == [shipped.target[example.place]]


def test_without_scikit_learn_the_cure_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcore_baselines.sources.images.digits.load_digits", None)
    with pytest.raises(UserError, match="scikit-learn") as caught:
        of("train")
    assert "kdcore[images]" in caught.value.cure


@given(st.lists(st.integers(0, 3), max_size=60), st.floats(0, 1), st.integers(0, 5))
def test_two_parts_share_no_row_and_are_all(labels: list[int], cut: float, seed: int) -> None:
    low, high = stratified(labels, 0, cut, seed), stratified(labels, cut, 1, seed)
    assert sorted(low + high) == list(range(len(labels)))
    assert low == sorted(low) and high == sorted(high)
    for label in set(labels):
        share = sum(labels[place] == label for place in low)
        assert abs(share - cut * labels.count(label)) <= 0.5 + 1e-9


def test_a_part_is_a_shuffle_and_not_the_beginning() -> None:
    labels = [0] * 1000
    assert stratified(labels, 0, 0.5) != stratified(labels, 0, 0.5, seed=1)
    first = stratified(labels, 0, 0.5)
    assert 200 < sum(place < 500 for place in first) < 300


def test_a_part_of_a_labelled_file(tmp_path: Path) -> None:
    rows = [f"text {n},{'even' if n % 2 == 0 else 'odd'}" for n in range(40)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")

    def read(**params: Any) -> list[str]:
        asked = LabelledTextParams(path=tmp_path / "rows.csv", **params)
        source = LabelledTextSource(asked, NO_CONTEXT)
        assert source.classes == ["even", "odd"]
        return [row.text for row in source.read()]

    train, held = read(part=(0, 0.9)), read(part=(0.9, 1))
    assert len(train) == 36 and len(held) == 4
    assert sorted(train + held) == sorted(read())
    assert read(part=(0, 0.9), limit=5) == train[:5]
    for part in ((0.5, 0.5), (0.9, 0.1), (0, 2)):
        with pytest.raises(ValidationError):
            LabelledTextParams(path=tmp_path / "rows.csv", part=part)
