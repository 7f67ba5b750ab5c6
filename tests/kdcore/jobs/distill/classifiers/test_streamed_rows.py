"""Labelled texts and images of a stream without an end: the rows of the data, read on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, List, Value

from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore_baselines.sources.hub import streams
from tests.fixtures.interrupted import interrupted_after
from tests.fixtures.json_lines import write_lines
from tests.fixtures.processes.forked import in_two_processes
from tests.fixtures.processes.two_processes import run
from tests.kdcore.jobs.distill.classifiers.test_augmentation import VIT
from tests.kdcore.jobs.distill.classifiers.test_classifiers import ELECTRA, LABELS_ALONE, weights
from tests.plugins.sources.test_hub_datasets import source
from tests.tiny.distill_specs import logged
from tests.tiny.tiny_chat_models import saved, tiny_model

COUNT = 11
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), np.uint8)
NAMES = ["cat", "dog", "owl"]
LABELS = [n % 3 for n in range(COUNT)]
TEXTS = [f"the mat of {n}" for n in range(COUNT)]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and texts with named classes."""
    folder, named = tmp_path_factory.mktemp("data"), ClassLabel(names=NAMES)
    images = Features({"image": Array3D((8, 8, 1), "uint8"), "label": named})
    Dataset.from_dict({"image": list(PIXELS), "label": LABELS}, images).to_parquet(
        folder / "images.parquet"
    )
    texts = Features({"text": Value("string"), "label": named})
    Dataset.from_dict({"text": TEXTS, "label": LABELS}, texts).to_parquet(folder / "texts.parquet")
    saved(tiny_model(), folder / "tokens")
    return folder


SIZES = {"image_dataset": {"channels": 1, "augment": {"crop_padding": 2, "flip": True}}}
KINDS = {"image_dataset": "images", "labelled_dataset": "texts"}


def asked(folder: Path, name: str, run: Path, **training: Any) -> dict[str, Any]:
    path = str(folder / f"{KINDS[name]}.parquet")
    stream = {"path": path, "streaming": True, "shuffle_buffer": 6}
    student: dict[str, Any] = {"model": "new", "config": VIT}
    if name == "labelled_dataset":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = ELECTRA | still | {"classifier_dropout": 0.0}
        student = {"model": "new", "config": config, "tokenizer": str(folder / "tokens")}
    return {
        "job": "distill",
        "run": str(run),
        "student": student,
        "data": {
            "train": {"name": name, **stream, **SIZES.get(name, {})},
            "max_length": 32,
        },
        "method": LABELS_ALONE,
        "training": {"batch_size": 4, "learning_rate": 1e-2, "steps": 7, "save_every": 2}
        | training,
    }


def tensors(made: Run, name: str) -> dict[str, torch.Tensor]:
    if name == "image_dataset":
        return weights(made)
    from safetensors.torch import load_file

    return load_file(made.path("model/model.safetensors"))


@pytest.mark.parametrize("name", KINDS)
def test_the_examples_are_those_of_the_data_from_any_place(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BATCH", 4)
    path, size = folder / f"{KINDS[name]}.parquet", SIZES.get(name, {})
    plain = source(name, path=path, **size)
    stream = source(name, path=path, streaming=True, **size)
    assert stream.classes == plain.classes == NAMES
    read, whole, states = stream.stream(), [], []
    states.append(read.state_dict())
    for each in read:
        whole.append(each)
        states.append(json.loads(json.dumps(read.state_dict())))
    tokenizer = tiny_model().tokenizer
    for ours, theirs in zip(whole, plain.read(), strict=True):
        one, two = stream.encode(ours, tokenizer, 9), plain.encode(theirs, tokenizer, 9)
        assert (one.id, one.labels.tolist()) == (two.id, two.labels.tolist())
        assert all(one.inputs[each].equal(value) for each, value in two.inputs.items())
    for place in (7, 0, 4, 10):
        read.load_state_dict(states[place])
        assert list(map(repr, read)) == list(map(repr, whole[place:]))
    assert len(set(map(repr, whole))) == COUNT, "a changed stream is noticed by them"
    with pytest.raises(UserError, match="is a stream without an end, which only"):
        stream.read()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_reads_on_to_the_same_bits(
    folder: Path, name: str, workers: int, tmp_path: Path
) -> None:
    """The stream begins again in it, and the views of an image are other ones then."""
    whole = tensors(distill(DistillSpec.model_validate(asked(folder, name, tmp_path / "a"))), name)
    trainer = {"dataloader_num_workers": workers}
    spec = DistillSpec.model_validate(asked(folder, name, tmp_path / "b", trainer=trainer))

    with interrupted_after(5):
        distill(spec)
    resumed = tensors(distill(spec, resume=True), name)
    assert all(torch.equal(resumed[each], weight) for each, weight in whole.items())


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_share_the_rows(folder: Path, name: str, tmp_path: Path) -> None:
    alone = asked(folder, name, tmp_path / "alone", save_every=None)
    losses = logged(distill(DistillSpec.model_validate(alone)))
    both = asked(folder, name, tmp_path / "run", save_every=None, batch_size=2)
    (tmp_path / "spec.yaml").write_text(json.dumps(both))  # JSON is YAML
    in_two_processes(tmp_path, run, ["distill", str(tmp_path / "spec.yaml")])
    assert logged(Run(tmp_path / "run")) == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_check_reads_the_first_rows(folder: Path, name: str, tmp_path: Path) -> None:
    spec = asked(folder, name, tmp_path / "run")
    held = {n: v for n, v in spec["data"]["train"].items() if n not in ("streaming", "augment")}
    spec["data"]["heldout"] = held
    report = preflight(DistillSpec.model_validate(spec))
    assert report.train.streamed and report.train.rows == COUNT and report.steps == 7


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_lines(path, rows)
    return path


def test_classes_without_names_are_those_of_another_split(tmp_path: Path) -> None:
    rows = [{"text": text, "label": NAMES[n]} for text, n in zip(TEXTS, LABELS, strict=True)]
    both = {"train": Dataset.from_list(rows[:8]), "test": Dataset.from_list(rows[:3])}
    DatasetDict(both).save_to_disk(tmp_path / "saved")
    asked = {"path": tmp_path / "saved", "streaming": True}
    with pytest.raises(UserError, match="does not have class names") as raised:
        source("labelled_dataset", **asked)
    assert "classes_split: test" in raised.value.cure
    found = source("labelled_dataset", **asked, classes_split="test")
    assert found.classes == NAMES
    assert [each.labels for each in found.stream()] == [(n,) for n in LABELS[:8]]


def test_mistakes_of_rows_are_told_when_they_are_read(tmp_path: Path) -> None:
    named = Features({"text": Value("string"), "label": List(ClassLabel(names=NAMES))})
    rows = {"text": ["a", "b", ""], "label": [[0, 2], [], [1]]}
    Dataset.from_dict(rows, named).to_parquet(tmp_path / "rows.parquet")
    found = source("labelled_dataset", path=tmp_path / "rows.parquet", streaming=True)
    assert found.multi_label
    read = iter(found.stream())
    assert [next(read).labels, next(read).labels] == [(0, 2), ()]
    with pytest.raises(UserError, match=r"rows\.parquet:3 has no text"):
        next(read)


@pytest.mark.needs("Pillow")
@pytest.mark.parametrize("kind", ["struct", "binary", "folder"])
def test_encoded_images_are_decoded_as_those_of_the_data(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    from tests.plugins.sources.test_images import png

    colours = np.repeat(PIXELS, 3, axis=-1)
    if kind == "folder":
        path = tmp_path / "images"
        for n, pixels in enumerate(colours):
            (path / "train" / NAMES[LABELS[n]]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path / "train" / NAMES[LABELS[n]] / f"{n}.png")
    else:
        from datasets import Image as ImageColumn

        column = ImageColumn() if kind == "struct" else Value("binary")
        stored = [png(pixels) for pixels in colours]
        image = [{"bytes": each, "path": None} for each in stored] if kind == "struct" else stored
        features = Features({"image": column, "label": ClassLabel(names=NAMES)})
        path = tmp_path / "rows.parquet"
        Dataset.from_dict({"image": image, "label": LABELS}, features).to_parquet(path)
    plain = source("image_dataset", path=path)
    stream = source("image_dataset", path=path, streaming=True)
    theirs = [plain.encode(each, None, 1) for each in plain.read()]
    ours = [stream.encode(each, None, 1) for each in stream.stream()]
    assert len(ours) == COUNT
    for one, two in zip(ours, theirs, strict=True):
        assert one.labels.equal(two.labels)
        assert one.inputs["pixel_values"].equal(two.inputs["pixel_values"])
