"""Augmented rows: another view in each epoch, the same for whoever makes it; caches are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from kdcore.data.batching.batches import Batches
from kdcore.data.rows import RowDataset
from kdcore.errors import UserError
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.method.records import Row
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.training import TrainingSpec
from kdcore.training.trainer.trainer import DistillationTrainer
from tests.fixtures.processes.forked import in_two_processes
from tests.fixtures.processes.two_processes import run
from tests.kdcore.jobs.distill.classifiers.test_classifiers import digits, weights
from tests.tiny.distill_specs import logged

AUGMENT = {"crop_padding": 2}


def spec(folder: Path, augment: Any = AUGMENT, **training: Any) -> DistillSpec:
    train = {"name": "digits", "limit": 24, "augment": augment}
    data = {"train": train, "heldout": {"name": "digits", "split": "test", "limit": 6}}
    asked = {"batch_size": 6, "learning_rate": 1e-2, "epochs": 3}
    return digits(folder, data=data, training=asked | training)


def noisy(row: Row, generator: torch.Generator) -> Row:
    x = row.inputs["x"]
    return Row({"x": x + torch.rand(1, generator=generator)}, row.labels, row.mask, row.id)


def batches(**training: Any) -> Batches:
    row = Row({"x": torch.zeros(1)}, torch.tensor([1]), torch.tensor([True]), "row")
    rows = RowDataset([row] * 10)
    asked = TrainingSpec.model_validate(training)
    return Batches.of(asked, rows, {}, seed=3, capacity=1, processes=1, augmentation=noisy)


def epoch(made: Batches, number: int, workers: int = 0) -> dict[int, float]:
    """What training sees of each row, in the order of the epoch."""
    order: Any = made.order
    order.set_epoch(number)
    loader = DataLoader(made.items, 4, sampler=order, collate_fn=made.collate, num_workers=workers)
    seen = {}
    for batch in loader:
        seen |= dict(zip(batch["index"].tolist(), batch["x"][:, 0].tolist(), strict=True))
    return seen


def test_each_epoch_has_another_order_and_other_views() -> None:
    made = batches()
    first, second = epoch(made, 0), epoch(made, 1)
    assert sorted(first) == sorted(second) == list(range(10)) and [*first] != [*second]
    assert len({*first.values(), *second.values()}) == 20, "no view twice"
    again = epoch(made, 0)
    assert again == first and [*again] == [*first]
    grouped = epoch(batches(group_by_length=True), 1)
    assert grouped == second and [*grouped] != [*second], "the view does not depend on the order"
    straight = batches(trainer={"train_sampling_strategy": "sequential"})
    assert [*epoch(straight, 1)] == list(range(10)) and epoch(straight, 1) == second


def test_workers_make_the_same_views() -> None:
    made = batches()
    one, two = epoch(made, 1), epoch(made, 1, workers=2)
    assert one == two and [*one] == [*two]


def test_a_resumed_run_sees_the_same_views(tmp_path: Path) -> None:
    whole = weights(distill(spec(tmp_path / "whole")))
    stopped = spec(tmp_path / "stopped", save_every=5)
    finish = DistillationTrainer._finish_step

    def killed(trainer: DistillationTrainer) -> None:
        if trainer.state.global_step == 7:  # after a checkpoint inside of the second epoch
            raise KeyboardInterrupt
        finish(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "_finish_step", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(stopped)
    assert (tmp_path / "stopped/run/checkpoint-5").is_dir()
    resumed = weights(distill(stopped, resume=True))
    assert all(torch.equal(resumed[name], each) for name, each in whole.items())
    other = weights(distill(spec(tmp_path / "plain", augment=None)))
    assert not all(torch.equal(other[name], each) for name, each in whole.items())


VIT = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
"""A model whose loss of a row does not depend on the other rows of its batch."""


def test_two_processes_see_the_views_of_one(tmp_path: Path) -> None:
    student = {"model": "new", "config": VIT}
    alone = spec(tmp_path / "alone", epochs=2).model_dump(mode="json") | {"student": student}
    losses = logged(distill(DistillSpec.model_validate(alone)))
    together = alone | {"run": str(tmp_path / "run")}
    together["training"] |= {"batch_size": 3}
    (tmp_path / "spec.yaml").write_text(json.dumps(together))  # JSON is YAML
    in_two_processes(tmp_path, run, ["distill", str(tmp_path / "spec.yaml")])
    assert len(losses) == 8
    assert logged(Run(tmp_path / "run")) == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"data": {"teacher_cache": "cache"}}, "a teacher cache"),
        ({"training": {"packing": True}}, "training.packing"),
    ],
)
def test_what_has_the_rows_as_they_are_is_refused(
    changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    asked = spec(tmp_path).model_dump(mode="json")
    for section, fields in changes.items():
        asked[section] |= fields
    with pytest.raises(UserError) as raised:
        preflight(DistillSpec.model_validate(asked))
    assert f"data.train augments its rows anew in each epoch, and {name} uses" in str(raised.value)


def test_a_cache_of_augmented_rows_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a teacher cache uses the rows as they are"):
        build_cache(spec(tmp_path), tmp_path / "cache")
