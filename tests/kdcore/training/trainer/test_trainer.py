"""The seam to the Trainer: accumulation, streams, resume, and a loss that is not finite."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PrinterCallback, TrainingArguments

from kdcore.components.registry import installed
from kdcore.data.batching.batches import Batches
from kdcore.data.responses.on_policy import OnPolicy
from kdcore.data.rows import RowDataset
from kdcore.errors import TrainingDiverged, UserError
from kdcore.method.logits import Head
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import LogitBatch, Row
from kdcore.models.assembly import Assembly
from kdcore.specs.parts.on_policy import OnPolicySpec
from kdcore.specs.parts.student_method import StudentMethodSpec
from kdcore.specs.parts.training import TrainingSpec
from kdcore.training.method import Method, build_objective, on_other_rows
from kdcore.training.teachers.kinds import LiveTeacher, NoTeacher, OfAnyRows
from kdcore.training.trainer.auxiliary import Auxiliary
from kdcore.training.trainer.probe import Probe
from kdcore.training.trainer.step_decay import StepDecay
from kdcore.training.trainer.trainer import DistillationTrainer
from kdcore.training.views import StudentView
from tests.tiny.models import language_model

DEEPKD = {
    "splitters": ["deepkd"],
    "momentum": "deepkd",
    "terms": {"task": 1.0},
    "gates": [{"name": "speckd", "verification": "sampling", "k": 2}],
}


def rows(count: int = 12, seed: int = 3) -> RowDataset:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = 5 + number % 4
        tokens = torch.randint(3, 61, (length,), generator=generator)
        mask = torch.zeros(length, dtype=torch.bool)
        mask[2 : length - 1] = True
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        made.append(Row(inputs, tokens.roll(-1), mask, f"row-{number}"))
    return RowDataset(made)


@dataclass(frozen=True)
class Watched:
    """A view in whose place a function of a test stands."""

    call: Callable[[Any, Any], Any]
    reference: Callable[[Any], Any]

    def __call__(self, model: Any, batch: Any, progress: float) -> Any:
        return self.call(model, batch)


def trainer(
    folder: Path,
    method: dict[str, Any],
    *,
    on_policy: dict[str, Any] | None = None,
    probe: tuple[int, int] | None = None,
    decay: StepDecay | None = None,
    batching: dict[str, Any] | None = None,
    auxiliary: dict[str, float] | None = None,
    **arguments: Any,
) -> DistillationTrainer:
    """``auxiliary``: the terms on 5 further rows, of which a micro-batch reads 3."""
    spec = StudentMethodSpec.model_validate(method)
    assembly = Assembly(installed())
    objective, policy = build_objective(spec, assembly), assembly.build(spec.momentum)
    student, teacher = language_model(seed=1), language_model(seed=2)
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "optim": "sgd" if policy.owns_momentum else "adamw_torch",
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data = rows()
    batches = Batches.of(
        TrainingSpec.model_validate(batching or {}),
        data,
        {"input_ids": 0, "attention_mask": 0},
        seed=0,
        capacity=16,
        processes=int(os.environ.get("WORLD_SIZE", 1)),
    )
    sampled = None
    if on_policy is not None:
        asked = OnPolicySpec.model_validate(on_policy)
        sampled = OnPolicy(asked, data.rows, teacher, [2], 61, positions=9)
    others = None if auxiliary is None else on_other_rows(objective, auxiliary)
    streams = Method(objective, policy, others).streams
    view, beside = StudentView(student, 61, LiveTeacher.of(teacher, 61)), None
    if others is not None:
        taught_by = OfAnyRows(view.taught_by) if others.of_teacher else NoTeacher()
        engine = LossEngine(others, streams, chunk=7)
        beside = Auxiliary(rows(5, 4), batches.collate, engine, view.beside(taught_by), 3, 0)
    made = DistillationTrainer(
        model=student,
        args=TrainingArguments(**(given | arguments)),
        engine=LossEngine(objective, streams, chunk=7),
        view=view,
        auxiliary=beside,
        streams=streams,
        policy=policy,
        row_ids=lambda index: f"row-{index}",
        logged=lambda step, figures: None,
        on_policy=sampled,
        probe=Probe(*probe) if probe else None,
        decay=decay,
        train_dataset=batches.items,
        data_collator=batches.collate,
        order=batches.order,
    )
    made.remove_callback(PrinterCallback)
    return made


@pytest.mark.parametrize("resumed", [False, True])
def test_the_learning_rate_falls_at_the_milestones(tmp_path: Path, resumed: bool) -> None:
    """Those of the 240 epochs of DeepKD's released recipe, at 150, 180 and 210."""
    training = TrainingSpec(schedule="multi_step", milestones=[0.625, 0.75, 0.875])
    lengths: dict[str, Any] = {"max_steps": 16, "save_strategy": "steps", "save_steps": 11}

    def at_start() -> DistillationTrainer:
        return trainer(tmp_path, {}, decay=StepDecay.of(training), optim="sgd", **lengths)

    made = at_start()
    made.train()
    if resumed:
        made = at_start()
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))
    rates = [line["learning_rate"] for line in made.state.log_history if "loss" in line]
    expected = [1e-2] * 10 + [1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2
    assert rates == pytest.approx(expected)


def test_the_warm_up_comes_before_the_milestones() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = StepDecay((0.5,), 0.5).scheduler(optimizer, warmup=4, steps=12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, *[0.5] * 6]


@pytest.mark.parametrize("wrong", [{"schedule": "multi_step"}, {"milestones": [0.5]}])
def test_milestones_and_their_schedule_need_each_other(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need each other"):
        TrainingSpec.model_validate(wrong)


def weights(made: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.model.state_dict().items()}


@pytest.mark.parametrize("normalize", ["sequence", "token", "accepted"])
@pytest.mark.parametrize("method", [{"gates": ["speckd"]}, DEEPKD | {"gates": ["speckd"]}])
def test_accumulation_gives_what_one_large_batch_gives(
    tmp_path: Path, method: dict[str, Any], normalize: str
) -> None:
    method = method | {"normalize": normalize}
    whole = trainer(tmp_path, method, per_device_train_batch_size=12, optim="sgd")
    split = trainer(
        tmp_path, method, per_device_train_batch_size=5, gradient_accumulation_steps=3, optim="sgd"
    )
    whole.train()
    split.train()
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(split)[name], rtol=1e-4, atol=1e-6)
    for large, small in zip(whole.state.log_history, split.state.log_history, strict=True):
        if "loss" in large:
            assert large["loss"] == pytest.approx(small["loss"], rel=1e-4)
            assert large["acceptance/speckd"] == pytest.approx(small["acceptance/speckd"])


@pytest.mark.parametrize(
    ("method", "on_policy"),
    [
        ({"gates": [{"name": "speckd", "verification": "sampling"}], "divergence": "taid"}, None),
        (DEEPKD, None),
        (DEEPKD | {"momentum": {"name": "deepkd", "kernel": "adamw"}}, None),
        ({}, {"probability": 0.6}),
        (DEEPKD, {"policy": "interleaved", "top_k": 3, "probability": 0.6}),
        ({"advantage": "minillm"}, {"policy": "mixed", "probability": 0.6}),
    ],
)
def test_a_resumed_run_ends_at_the_same_bits(
    tmp_path: Path, method: dict[str, Any], on_policy: dict[str, Any] | None
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    saving["on_policy"] = on_policy
    whole = trainer(tmp_path / "whole", method, **saving)
    whole.train()
    torch.manual_seed(99)  # nothing may depend on what the process drew before
    resumed = trainer(tmp_path / "resumed", method, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    kinds = {path.suffix for path in (tmp_path / "whole" / "checkpoint-3").iterdir()}
    assert kinds == {".safetensors", ".json"}, "nothing may be pickled"
    assert whole.state.log_history[-2]["loss"] == resumed.state.log_history[-2]["loss"]
    state = resumed.policy.state_dict()
    assert state.keys() == whole.policy.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in whole.policy.state_dict().items())


@pytest.mark.parametrize("bf16", [False, True])
def test_the_precision_is_that_of_both_bodies_and_both_heads(
    tmp_path: Path, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {"heads": set(), "student": set(), "teacher": set()}
    linear = Head.linear

    def watched(self: Head, hidden: torch.Tensor) -> torch.Tensor:
        found = linear(self, hidden)
        seen["heads"].add(found.dtype)
        return found

    made = trainer(tmp_path, {"gates": ["speckd"]}, max_steps=1, bf16=bf16)
    monkeypatch.setattr(Head, "linear", watched)
    view: Any = made.view
    for name, model in (("student", made.model), ("teacher", view.taught_by.model)):
        model.model.layers[0].mlp.register_forward_hook(
            lambda module, given, found, name=name: seen[name].add(found.dtype)
        )
    made.train()
    wanted = torch.bfloat16 if bf16 else torch.float32
    assert seen == {"heads": {wanted}, "student": {wanted}, "teacher": {wanted}}
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("steps", [4, 6], ids=["within an epoch", "at the end of an epoch"])
def test_a_run_that_was_killed_after_its_last_checkpoint_trains_no_more(
    tmp_path: Path, steps: int
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps}
    whole = trainer(tmp_path / "whole", DEEPKD, **saving)
    whole.train()
    resumed = trainer(tmp_path / "resumed", DEEPKD, **saving)
    steps_done: list[int] = []
    resumed.step_done = lambda step, figures: steps_done.append(step)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    assert steps_done == [] and resumed.state.global_step == steps
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_one_stream_of_the_shared_policy_is_the_plain_optimizer(tmp_path: Path) -> None:
    ours = trainer(tmp_path, {"momentum": "shared"}, optim="adamw_torch")
    plain = trainer(tmp_path, {"momentum": "shared"}, optim="adamw_torch")
    plain._gradients.combine = lambda parameters: None  # type: ignore[method-assign]
    ours.train()
    plain.train()
    assert all(torch.equal(v, weights(plain)[k]) for k, v in weights(ours).items())


def test_a_resumed_training_warns_of_no_weight_that_is_tied_to_a_stored_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.language_model", partial(language_model, "gpt2"))
    trainer(tmp_path, {}, save_strategy="steps", save_steps=2).train()
    made = trainer(tmp_path, {})
    assert made.model.lm_head.weight is made.model.transformer.wte.weight
    told: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", told.append)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not told and made.state.global_step == 4
    lost = made.model.load_state_dict({}, strict=False)
    made._issue_warnings_after_load(lost)
    assert "missing keys" in told[0] and "wte.weight" in told[0]


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(tmp_path: Path) -> None:
    made = trainer(tmp_path, {})
    with torch.no_grad():
        made.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"step 1 .*row-\d") as stopped:
        made.train()
    assert "learning_rate" in stopped.value.cure


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_a_gate_whose_weights_are_not_finite_is_named(tmp_path: Path, floor: float) -> None:
    class Broken:
        def __init__(self) -> None:
            self.floor = floor

        def __call__(self, batch: LogitBatch) -> torch.Tensor:
            return batch.mask / 0.0

    made = trainer(tmp_path, {"gates": ["all"]})
    (label,) = made.engine.objective.gates
    made.engine.objective.gates[label] = Broken()  # type: ignore[index]
    said = f"; the weights of gate '{label}' are not finite; rows"
    with pytest.raises(TrainingDiverged, match=said) as stopped:
        made.train()
    assert f"check these rows and gate '{label}'" in stopped.value.cure
    assert "rerun with resume=True if the spec is unchanged" in stopped.value.cure


@pytest.mark.parametrize("weight", [-0.5, 1.5])
def test_gate_weights_outside_the_range_stop_before_any_weight_changes(
    tmp_path: Path, weight: float
) -> None:
    made = trainer(tmp_path, {"gates": ["all"]})
    before = weights(made)
    (label,) = made.engine.objective.gates

    def wrong(batch: Any) -> torch.Tensor:
        return torch.where(batch.labels == batch.labels[0, 0], weight, batch.mask.float())

    made.engine.objective.gates[label] = wrong  # type: ignore[index]
    said = rf"gate '{label}' gave \d+ weights? outside \[0, 1\] at step 1; rows: row-\d"
    with pytest.raises(UserError, match=said) as stopped:
        made.train()
    assert "correct the gate" in stopped.value.cure
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())
