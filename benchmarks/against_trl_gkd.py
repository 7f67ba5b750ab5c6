"""What a distillation step costs beside TRL's GKD trainer, which is installed beside kdcore.

    python -m pip install trl==1.16.0
    python benchmarks/against_trl_gkd.py [--rows 8] [--rounds 5] > against_trl_gkd.json

Models and rows are those of distillation_step.py; all students begin equal. TRL computes the same
loss as the KD arm: beta 0 is forward KL, lmbda 0 takes the data's responses, and dropout is off.
Its defaults of bf16, gradient checkpointing and a fused optimizer are turned off, as in the arms
of kdcore, and its training step is called without the loop around it: no logging, no data loading.

Arms take turns and medians are compared. Peak memory is what two steps add to a process of its own
that holds both models: gradients, the optimizer's moments, activations and logits.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from distillation_step import (
    METHODS,
    TEACHER,
    Arm,
    added_at_peak,
    arguments,
    batch,
    in_a_process,
    student_of,
)

from kdcore.method.records import Batch
from kdcore.models.loading.load import load_model
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.fields import ModelSpec
from kdcore.training.model_view import ModelView

try:
    from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError:
    sys.exit("TRL is not installed: python -m pip install trl==1.16.0")

ARMS = ("trl_gkd", "kd", "speckd", "speckd_v1")


class Gkd:
    """TRL's trainer with a student and an optimizer of its own."""

    def __init__(self, teacher: LoadedModel, given: Batch) -> None:
        options = GKDConfig(
            output_dir=tempfile.mkdtemp(),
            lmbda=0.0,
            beta=0.0,
            learning_rate=1e-5,
            per_device_train_batch_size=len(given.labels),
            optim="adamw_torch",
            weight_decay=0.01,  # as torch's AdamW
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        self.trainer: Any = GKDTrainer(
            student_of(teacher),
            teacher.model,
            options,
            train_dataset=_unread(),
            processing_class=teacher.tokenizer,
        )
        self.trainer.create_optimizer()
        self.trainer.model.train()
        self.inputs = whole_rows(given)
        self.learned = int(given.mask.sum())
        self.loss = 0.0

    def step(self, given: Batch, view: ModelView, teacher: Any) -> float:
        """Seconds of one step."""
        begun = time.perf_counter()
        found = self.trainer.training_step(self.trainer.model, dict(self.inputs), self.learned)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.loss = float(found)
        return time.perf_counter() - begun


def _unread() -> Any:
    """The trainer wants a data set; its steps are given their batch."""
    from datasets import Dataset

    return Dataset.from_list([{"messages": []}])


def whole_rows(given: Batch) -> dict[str, torch.Tensor]:
    """A batch as TRL has it: labels stand at their own token, so rows are a token longer."""
    ids, attended = given.inputs["input_ids"], given.inputs["attention_mask"]
    row, last = torch.arange(len(ids)), attended.sum(1)
    ids = torch.nn.functional.pad(ids, (0, 1))
    ids[row, last] = given.labels[row, last - 1]
    labels = torch.full_like(ids, -100)
    labels[:, 1:][given.mask] = given.labels[given.mask]
    attended = torch.nn.functional.pad(attended, (1, 0), value=1)
    return {"input_ids": ids, "attention_mask": attended, "labels": labels}


def arm_of(name: str, teacher: LoadedModel, given: Batch) -> Arm | Gkd:
    """An arm by its name."""
    return Gkd(teacher, given) if name == "trl_gkd" else Arm(METHODS[name], student_of(teacher))


def set_up(rows: int) -> tuple[LoadedModel, ModelView, Batch]:
    """The teacher, how its logits are seen, and the batch."""
    teacher = load_model(ModelSpec.model_validate({"model": TEACHER}))
    return teacher, ModelView(teacher.model, 49152), batch(teacher.tokenizer, rows)


def step_memory(name: str, rows: int, queue: Any) -> None:
    """Bytes that two steps of an arm add to a process at its peak."""
    teacher, view, given = set_up(rows)
    arm = arm_of(name, teacher, given)

    def two_steps() -> None:
        for _ in range(2):
            arm.step(given, view, teacher.model)

    queue.put(added_at_peak(two_steps))


def main() -> None:
    """Run all arms in turns and print JSON."""
    asked = arguments()
    memory = {name: in_a_process(step_memory, name, asked.rows) for name in ARMS}
    teacher, view, given = set_up(asked.rows)
    arms = {name: arm_of(name, teacher, given) for name in ARMS}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    first: dict[str, float] = {}
    for turn in range(asked.rounds + 1):
        for name, arm in arms.items():
            spent = arm.step(given, view, teacher.model)
            first.setdefault(name, arm.loss)
            if turn:  # the first warms up
                seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "rows": asked.rows,
                "positions": list(given.labels.shape),
                "learned_positions": int(given.mask.sum()),
                "first_loss": first,
                "median_seconds": medians,
                "seconds": seconds,
                "over_trl_gkd": {n: value / medians["trl_gkd"] for n, value in medians.items()},
                "peak_memory_bytes": memory,
                "memory_over_trl_gkd": {n: b / memory["trl_gkd"] for n, b in memory.items()},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
