"""The loader of the training rows: workers and prefetching are the Trainer's."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.data.batching.anchors import AnchorCollation
from kdcore.data.batching.batches import Batches
from kdcore.specs.parts.training import TrainingSpec
from tests.kdcore.training.trainer.test_trainer import rows, trainer

FIELDS = ("num_workers", "prefetch_factor", "persistent_workers")


def test_the_fields_of_the_trainer_reach_the_loader(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": True,
    }
    made = trainer(tmp_path, {}, batching={"group_by_length": True}, **asked)
    loader = made.get_train_dataloader()
    assert {f"dataloader_{name}": getattr(loader, name) for name in FIELDS} == asked


@pytest.mark.parametrize("batching", [{}, {"packing": True}, {"group_by_length": True}])
def test_a_worker_that_is_spawned_makes_the_same_batches(batching: dict[str, Any]) -> None:
    """macOS and Windows spawn them: all that a worker needs is pickled."""
    training = TrainingSpec.model_validate(batching)
    pad = {"input_ids": 0, "attention_mask": 0}
    batches = Batches.of(training, rows(), pad, seed=0, capacity=16, processes=1)
    collate: Any = batches.collate
    if not training.packing:
        collate = AnchorCollation(collate, 2, None)
    items, again = ForkingPickler.loads(ForkingPickler.dumps((batches.items, collate)))
    ours = collate([batches.items[n] for n in range(3)])
    theirs = again([items[n] for n in range(3)])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(each, theirs[name]) for name, each in ours.items())
