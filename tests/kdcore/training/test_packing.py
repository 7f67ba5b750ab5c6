"""Packed rows give the loss and the gradients of rows that are padded, to float64 rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from kdcore.components.registry import installed
from kdcore.data.batching.packing import PackedRows, Packing
from kdcore.data.best_classes import CachedLogits
from kdcore.data.rows import batch_of, collate
from kdcore.errors import UserError
from kdcore.method.logits import Head
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Row
from kdcore.models.assembly import Assembly
from kdcore.models.probes import refuse_mixing
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.student_method import StudentMethodSpec
from kdcore.specs.train_drafter import TrainDrafterSpec
from kdcore.training.method import build_objective
from kdcore.training.teachers.kinds import CachedTeacher, LiveTeacher
from kdcore.training.trainer.trainer import DistillationTrainer
from kdcore.training.views import StudentView
from tests.fixtures.processes.forked import in_two_processes
from tests.kdcore.training.test_composition import every
from tests.kdcore.training.trainer.test_trainer import trainer
from tests.tiny.models import classifier
from tests.tiny.targets import CLASSES, FAMILIES, SIZE, tiny

MODEL = {"model": "some/model"}
DATA = {"train": {"name": "chat", "path": "rows.jsonl"}}
PAD = {"input_ids": 0, "attention_mask": 0}


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for number, length in enumerate([5, 9, 3, 12, 7, 4]):
        tokens = torch.randint(CLASSES, (length + 1,), generator=generator)
        inputs = {"input_ids": tokens[:-1], "attention_mask": torch.ones(length).long()}
        made.append(Row(inputs, tokens[1:], torch.arange(length) >= number % 3, f"row {number}"))
    return made


@dataclass(frozen=True)
class Wide:
    """Logits in float64."""

    made: CachedLogits

    def logits(self, chunk: slice) -> Tensor:
        return self.made.logits(chunk).double()


class Cached:
    """A teacher cache of rows, by their index: the top 5 classes, and the probability of the rest.

    Its rows are drawn, so that a row that reads another one's is noticed.
    """

    def arrays(self, keys: list[int]) -> dict[str, Tensor]:
        found = []
        for key in keys:
            generator = torch.Generator().manual_seed(key)
            count = int(rows()[key].mask.sum())
            ids = torch.rand(count, CLASSES, generator=generator).argsort(1)[:, :5]
            logp = torch.rand(count, 5, generator=generator).log_softmax(1) - 0.1
            found.append((ids, logp[:, :-1], torch.full((count,), 1 - 0.9).log()))
        joined = (torch.cat(each) for each in zip(*found, strict=True))
        return dict(zip(("ids", "logp", "tail"), joined, strict=True))

    def taken(self, arrays: dict[str, Tensor], device: torch.device) -> Wide:
        return Wide(CachedLogits(arrays["ids"], arrays["logp"], arrays["tail"], CLASSES))


def in_float64(self: Head, linear: Tensor) -> Tensor:
    return linear.double() * self.scale


def loss_and_gradients(
    student: PreTrainedModel, view: StudentView, method: dict[str, Any], padded: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    spec, assembly = StudentMethodSpec.model_validate(method), Assembly(installed())
    objective = build_objective(spec, assembly)
    policy = assembly.build(spec.momentum)
    batch = batch_of(padded)
    reference: Any = view.taught_by.of_any(batch) if objective.reference else None
    found = LossEngine(objective, policy.streams(tuple(objective.weights)), chunk=7)(
        *view(student, batch, 0.5),
        batch,
        whole=float(batch.mask.sum() if spec.normalize == "token" else len(batch.mask)),
        progress=0.5,
        generator=torch.Generator().manual_seed(1),
        reference=reference,
    )
    total = torch.stack(list(found.losses.values())).sum()
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    return found.figures, list(torch.autograd.grad(total, weights))


def dealt() -> list[tuple[dict[str, Any], bool]]:
    """A gate, a divergence and a splitter of each, all of `normalize`, teacher live and cached."""
    gates, divergences, splitters = map(every, ("gate", "divergence", "splitter"))
    splitters = [each for each in splitters if each["name"] != "top_k_mask"]
    cases = []
    for n in range(3 * max(map(len, (gates, divergences, splitters)))):
        gate, cached = gates[n % len(gates)], n % 2 == 1
        method = {
            "gates": [gate],
            "divergence": divergences[(n + n // len(gates)) % len(divergences)],
            "splitters": [splitters[(n + n // len(splitters)) % len(splitters)]],
            "normalize": ("sequence", "token", "accepted")[n // len(gates) % 3],
            "terms": {"task": 0.5},
        }
        cases.append((method, cached))
    return cases


def test_packing_changes_no_loss_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "finish", in_float64)
    torch.manual_seed(0)
    student, teacher = (tiny("gpt2", seed=seed).double() for seed in (11, 12))
    try:
        live = LiveTeacher.of(teacher, CLASSES)
        cached_teacher = CachedTeacher(Cached(), range(6), live)  # type: ignore[arg-type]
        views = [StudentView(student, CLASSES, each) for each in (live, cached_teacher)]
        packs = PackedRows(rows(), 16, seed=0)
        items = [packs[n] for n in range(len(packs))]
        packed = [Packing(PAD, flat)(items) for flat in (False, True)]
        assert len(packs) < 4
        alone = collate([row for n in range(len(packs)) for row in packs[n]], PAD)
        for number, (method, cached) in enumerate(dealt()):
            seen = [
                loss_and_gradients(student, views[cached], method, padded)
                for padded in (packed[number % 3 == 0], alone)
            ]
            (figures, gradients), (expected, plain) = seen
            for name, value in expected.items():
                torch.testing.assert_close(figures[name], value, msg=f"{name} of {method}")
            for ours, theirs in zip(gradients, plain, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    finally:
        tiny.cache_clear()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_position_ids_keep_packed_rows_apart(family: str, flat: bool) -> None:
    refuse_mixing(tiny(family), family, flat=flat)


SMALL: dict[str, Any] = {**SIZE, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2), "does not take"),
        (lambda: BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "does not take"),
        (
            lambda: Qwen3NextConfig(
                **SMALL, head_dim=8, layer_types=["linear_attention", "full_attention"]
            ),
            "depend on the row before",
        ),
    ],
    ids=["recurrent", "no position ids", "linear attention"],
)
def test_a_model_that_mixes_packed_rows_is_refused(make: Callable[[], Any], why: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make()).eval()
    with pytest.raises(UserError, match=f"the student does not keep packed rows apart: .*{why}"):
        refuse_mixing(model, "the student", flat=False)


def test_packed_rows_under_alibi_are_refused_where_they_cross() -> None:
    """Falcon's biases cross rows before transformers 5.24, and not from then on."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(FalconConfig(**SMALL, alibi=True)).eval()
    tokens, positions = torch.arange(9)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 4:]
        alone = model(input_ids=tokens[:, 4:], use_cache=False).logits
    apart = torch.allclose(packed, alone, atol=1e-5)
    with nullcontext() if apart else pytest.raises(UserError, match="depend on the row before"):
        refuse_mixing(model, "the student", flat=False)


@pytest.mark.parametrize("wrong", ["positions", "attention"])
def test_the_probe_sees_what_packing_must_not_do(wrong: str) -> None:
    """Flash attention reads several packed sequences as plain ones; positions may not restart."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    forward = model.model.forward

    def mistaken(*given: Any, position_ids: Any = None, **others: Any) -> Any:
        if wrong == "attention" and position_ids is not None:
            others["attention_mask"] = torch.ones_like(others["input_ids"])
        elif position_ids is not None:
            position_ids = position_ids * 3
        return forward(*given, position_ids=position_ids, **others)

    model.model.forward = mistaken
    with pytest.raises(UserError, match="does not keep packed rows apart"):
        refuse_mixing(model, "the student", flat=False)


KINDS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True},
    "grouped": {"group_by_length": True, "batch_size": 4},
}


def resumed_in_the_second_epoch(folder: Path, kind: str, batch: int, processes: int) -> None:
    """Train two epochs of three steps, and their end again from a checkpoint in the second."""
    begun: list[DistillationTrainer] = []
    seen: list[list[list[int]]] = []
    for name in ("whole", "resumed"):
        made = trainer(
            folder / kind / name,
            {"gates": ["speckd"]},
            batching=KINDS[kind],
            per_device_train_batch_size=batch,
            max_steps=6,
            data_seed=0,
            save_strategy="steps",
            save_steps=4,
        )
        steps: list[list[int]] = []
        step = made.training_step

        def watched(
            model: Any, inputs: Any, *rest: Any, step: Any = step, steps: Any = steps
        ) -> Any:
            steps.append(inputs["index"].tolist())
            return step(model, inputs, *rest)

        made.training_step = watched  # type: ignore[method-assign]
        assert -(-len(made.train_dataset) // (batch * processes)) == 3  # type: ignore[arg-type]
        start = None if name == "whole" else str(folder / kind / "whole" / "checkpoint-4")
        torch.manual_seed(len(begun))  # nothing may depend on what the process drew before
        made.train(resume_from_checkpoint=start)
        begun.append(made)
        seen.append(steps)
    whole, again = seen
    assert again == whole[4:]
    assert whole[:3] != whole[3:]
    if processes == 1:
        assert sorted(chain(*whole[:3])) == sorted(chain(*whole[3:])) == list(range(12))
    ours, theirs = (dict(made.model.state_dict()) for made in begun)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_resumed_in_its_second_epoch_reads_the_rows_that_are_left(
    tmp_path: Path, kind: str
) -> None:
    resumed_in_the_second_epoch(tmp_path, kind, 2 if kind == "packed" else 4, processes=1)


def both_orders(folder: Path) -> None:
    """Packed rows have the order of padded ones."""
    for kind in ("padded", "grouped"):
        resumed_in_the_second_epoch(folder, kind, 2, processes=2)


def test_so_does_one_in_two_processes(tmp_path: Path) -> None:
    in_two_processes(tmp_path, both_orders, tmp_path)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"training": {"packing": True, "group_by_length": True}}, "remove one of them"),
        ({"data": {**DATA, "on_policy": {}}}, "data.on_policy: a response"),
        ({"method": {"alignment": "spans"}}, "method.alignment: a teacher"),
        ({"job": "train-drafter", "target": MODEL, "drafter": "medusa"}, "layers attend to the"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(given: dict[str, Any], why: str) -> None:
    models = {} if "job" in given else {"student": MODEL, "teacher": MODEL}
    asked = {"data": DATA, "training": {"packing": True}} | models | given
    make = TrainDrafterSpec if "job" in given else DistillSpec
    with pytest.raises(ValidationError) as refused:
        make.model_validate(asked)
    (mistake,) = refused.value.errors()
    assert why in mistake["msg"] and "\n" not in mistake["msg"]


def test_a_classifier_is_not_packed() -> None:
    with pytest.raises(UserError, match="the student is a classifier"):
        refuse_mixing(classifier(), "the student", flat=False)
