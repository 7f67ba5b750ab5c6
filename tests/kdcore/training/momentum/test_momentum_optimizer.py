"""The optimizer for other loops: the Trainer's updates, and torch's habits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from kdcore import DistillationLoss, MomentumOptimizer, UserError
from kdcore.data.rows import batch_of
from kdcore.method.loss_engine import LossEngine
from kdcore.training import stream_gradients
from kdcore.training.teachers.kinds import LiveTeacher
from kdcore.training.views import StudentView
from kdcore_baselines import Shared
from kdcore_deepkd import DeepKDMomentum, DeepKDSplitter, PerTerm
from kdcore_speckd import SpecKD
from tests.fixtures.processes.forked import in_two_processes
from tests.kdcore.training.momentum.student_of_terms import TERMS, Student, begun, same
from tests.kdcore.training.trainer.test_trainer import trainer, weights
from tests.tiny.models import language_model

MOMENTA: list[dict[str, Any]] = [
    {"name": "deepkd", "weight_decay": 0.1},  # two streams, and a buffer of the decay
    {"name": "per_term", "overrides": {"task": 0.95, "target": 0.5}, "clip": 0.1},
    {"name": "per_term", "overrides": {"task": 0.95, "target": 0.5}, "kernel": "adamw"},
]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_it_steps_as_a_run_does_bit_for_bit(
    tmp_path: Path, momentum: dict[str, Any], accumulation: int
) -> None:
    """Three buffers, gradient accumulation, a schedule of the learning rate."""
    method = {"splitters": ["deepkd"], "momentum": momentum, "terms": {"task": 1.0}}
    run = trainer(
        tmp_path,
        method | {"gates": ["speckd"]},
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )
    seen: list[tuple[dict[str, Any], float]] = []
    step_of_the_run = run.training_step

    def recorded(model: nn.Module, inputs: dict[str, Any], count: Any = None) -> Tensor:
        seen.append((inputs, float(count)))
        return step_of_the_run(model, inputs, count)

    run.training_step = recorded  # type: ignore[method-assign]
    run.train()
    assert len(seen) == 4 * accumulation and len(run.policy.norms()) >= 3  # type: ignore[attr-defined]

    student, keywords = language_model(seed=1).train(), dict(momentum)
    policy = {"deepkd": DeepKDMomentum, "per_term": PerTerm}[keywords.pop("name")](**keywords)
    engine = LossEngine(run.engine.objective, policy.streams(("task", *TERMS[1:])), chunk=7)
    view = StudentView(student, 61, LiveTeacher.of(language_model(seed=2), 61))
    optimizer = MomentumOptimizer(SGD(student.parameters(), 1e-2), policy, streams=engine.streams)
    scheduler = LambdaLR(optimizer, lambda step: (4 - step) / 4)
    for number, (inputs, whole) in enumerate(seen):
        batch, progress = batch_of(inputs), number // accumulation / 4
        found = engine(
            *view(student, batch, progress),
            batch,
            whole=whole,
            progress=progress,
            generator=torch.Generator().manual_seed(0),
        )
        optimizer.backward(found.losses)
        if (number + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    for name, value in weights(run).items():
        assert torch.equal(value, student.state_dict()[name]), name


def test_losses_by_term_are_grouped_as_the_policy_says() -> None:
    """One momentum for all terms is torch's SGD; micro-batches and a forgotten zero_grad aside."""
    ours, plain = Student(), Student()
    optimizer = MomentumOptimizer(SGD(ours.parameters(), lr=0.1), PerTerm(mu=0.9))
    torch_s = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    apart = Student()
    two = begun(apart, d=1e-9)  # two streams of nearly one momentum
    for step in range(4):
        torch_s.zero_grad()
        for micro in range(2):
            optimizer.backward(ours.losses(10 * step + micro))
            two.backward(apart.losses(10 * step + micro))
            sum(plain.losses(10 * step + micro).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        two.step()
        torch_s.step()
    for each in (ours, apart):
        torch.testing.assert_close(each.layer.weight, plain.layer.weight)
        assert torch.equal(each.unused, torch.ones(2))
        assert all(parameter.grad is None for parameter in each.parameters())


def test_a_method_s_loss_and_its_momenta_follow_their_formula() -> None:
    """Each stream's heavy ball, written out beside a loop of ten lines."""
    rows, teacher = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 1, 2, 0, 1], [-100, 2, 1, 0, 2]])
    loss_of = DistillationLoss(
        gates=[SpecKD(k=2)],
        splitters=[DeepKDSplitter(k=1.0)],
        terms={"task": 1.0},
        momentum=DeepKDMomentum(mu=0.8, d=0.1),
        steps=4,
    )
    student, expected = nn.Linear(4, 4), nn.Linear(4, 4)
    expected.load_state_dict(student.state_dict())
    streams = loss_of.engine.streams
    assert {*streams} == {"task+non_target", "target"}
    momenta = {stream: 0.7 if stream == "target" else 0.9 for stream in streams}
    optimizer = MomentumOptimizer(
        SGD(student.parameters(), lr=0.1), loss_of.policy, streams=streams
    )
    buffers = {stream: torch.zeros(4, 4) for stream in streams}
    expected.requires_grad_(True).bias.requires_grad_(False)
    student.bias.requires_grad_(False)
    for _ in range(4):
        found = loss_of.by_stream(expected(rows), teacher, labels)
        for stream, loss in found.items():
            (grad,) = torch.autograd.grad(loss, [expected.weight], retain_graph=True)
            buffers[stream] = grad + momenta[stream] * buffers[stream]
        optimizer.zero_grad()
        optimizer.backward(loss_of.by_stream(student(rows), teacher, labels))
        optimizer.step()
        loss_of.step()
        with torch.no_grad():
            expected.weight -= 0.1 * sum(buffers.values())
    torch.testing.assert_close(student.weight, expected.weight)


def test_losses_by_stream_and_by_term_are_the_same() -> None:
    by_term, by_stream = Student(), Student()
    policy = DeepKDMomentum()
    streams = policy.streams(TERMS)
    assert streams == {"task+non_target": ("task", "non_target"), "target": ("target",)}
    first = begun(by_term)
    second = MomentumOptimizer(SGD(by_stream.parameters(), lr=0.1), policy, streams=streams)
    for step in range(3):
        first.backward(by_term.losses(step))
        losses = by_stream.losses(step)
        second.backward({s: sum(losses[t] for t in members) for s, members in streams.items()})  # type: ignore[misc]
        first.step()
        second.step()
    torch.testing.assert_close(by_term.layer.weight, by_stream.layer.weight)


@pytest.mark.parametrize("kernel", ["sgd", "adamw"])
def test_a_saved_and_resumed_loop_goes_on_bit_for_bit(kernel: str) -> None:
    """The tensors go through safetensors; schedule and param groups go with them."""

    def loop(student: Student, given: MomentumOptimizer, schedule: LambdaLR, steps: range) -> None:
        for step in steps:
            given.zero_grad()
            given.backward(student.losses(step))
            given.step()
            schedule.step()

    def parts(student: Student) -> tuple[MomentumOptimizer, LambdaLR]:
        given = begun(student, kernel=kernel, weight_decay=0.1)
        return given, LambdaLR(given, lambda step: 1 / (1 + step))

    whole, resumed = Student(), Student()
    given, schedule = parts(whole)
    loop(whole, given, schedule, range(3))
    state, of_schedule = given.state_dict(), schedule.state_dict()
    buffers = safetensors.torch.save(state["policy"])
    kept = safetensors.torch.save(whole.state_dict())
    loop(whole, given, schedule, range(3, 6))

    resumed.load_state_dict(safetensors.torch.load(kept))
    again, schedule = parts(resumed)
    again.load_state_dict(state | {"policy": safetensors.torch.load(buffers)})
    schedule.load_state_dict(of_schedule)
    assert schedule.optimizer is again and again.param_groups is again.optimizer.param_groups
    loop(resumed, again, schedule, range(3, 6))
    assert same(whole, resumed)
    assert again.param_groups[0]["lr"] == given.param_groups[0]["lr"] == 0.1 * (1 / 7)


def test_param_groups_have_their_own_learning_rate_and_one_can_be_added() -> None:
    student, other = Student(), Student()
    groups = [{"params": [student.layer.weight], "lr": 0.2}, {"params": [student.layer.bias]}]
    optimizer = MomentumOptimizer(SGD(groups, lr=0.1), DeepKDMomentum())
    optimizer.add_param_group({"params": [student.unused], "lr": 0.3})
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.2, 0.1, 0.3]
    plain = begun(other)
    for each, given in ((student, optimizer), (other, plain)):
        given.backward(each.losses(0))
        given.step()
    start = Student().layer
    torch.testing.assert_close(
        student.layer.weight - start.weight, 2 * (other.layer.weight - start.weight)
    )
    assert torch.equal(student.layer.bias, other.layer.bias)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(UserError, match="parameters were added, frozen or unfrozen"):
        optimizer.backward(student.losses(1))


def test_accelerate_prepares_it_and_holds_steps_back_while_gradients_accumulate() -> None:
    GradientState._reset_state()  # or it is at the end of another test's rows
    prepared, plain = Student(), Student()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    momenta, other = begun(prepared), begun(plain)
    model, optimizer = accelerator.prepare(prepared, momenta)
    for step in range(4):
        with accelerator.accumulate(model):
            momenta.backward(prepared.losses(step))
            optimizer.step()
            optimizer.zero_grad()
        other.backward(plain.losses(step))
        if step % 2:
            other.step()
    assert same(prepared, plain) and not same(plain, Student())


def one_of_two(folder: Path) -> None:
    """A loop in one of two processes, each with every second micro-batch."""
    torch.distributed.init_process_group("gloo")
    rank, student = torch.distributed.get_rank(), Student()
    optimizer = begun(student, weight_decay=0.1)
    for step in range(3):
        optimizer.backward(student.losses(2 * step + rank))
        optimizer.step()
    safetensors.torch.save_file(student.state_dict(), folder / f"weights-{rank}")


def test_two_processes_take_the_mean_of_their_gradients(tmp_path: Path) -> None:
    in_two_processes(tmp_path, one_of_two, tmp_path)
    alone = Student()
    optimizer = begun(alone, weight_decay=0.1)
    for step in range(3):
        for micro in range(2):
            losses = alone.losses(2 * step + micro)
            optimizer.backward({term: loss / 2 for term, loss in losses.items()})
        optimizer.step()
    first, second = (safetensors.torch.load_file(tmp_path / f"weights-{rank}") for rank in (0, 1))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


def test_a_closure_computes_the_losses() -> None:
    ours, plain = Student(), Student()
    optimizer, other = begun(ours), begun(plain)

    def closure() -> float:
        losses = ours.losses(0)
        optimizer.backward(losses)
        return float(losses["task"].detach())

    other.backward(plain.losses(0))
    other.step()
    assert optimizer.step(closure) == float(Student().losses(0)["task"].detach())
    assert same(ours, plain)


class Halves:
    """A policy of two streams that leaves the momentum to the optimizer."""

    owns_momentum = False

    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {term: (term,) for term in terms}

    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        return [torch.stack(each).mean(0) for each in zip(*gradients.values(), strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        raise AssertionError("there is nothing to load")


def test_the_gradient_is_clipped_between_combine_and_step() -> None:
    """Any optimizer is right behind a policy that owns no momentum."""
    ours, plain = Student(), Student()
    optimizer = MomentumOptimizer(AdamW(ours.parameters(), lr=0.1), Halves())
    torch_s = AdamW(plain.parameters(), lr=0.1)
    for step in range(3):
        optimizer.backward(ours.losses(step, ("task", "kd")))
        optimizer.combine()
        norm = clip_grad_norm_(ours.parameters(), 0.01)
        optimizer.step()
        torch_s.zero_grad()
        (sum(plain.losses(step, ("task", "kd")).values()) / 2).backward()  # type: ignore[union-attr]
        assert float(norm) == pytest.approx(float(clip_grad_norm_(plain.parameters(), 0.01)))
        torch_s.step()
        optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(ours.layer.weight, plain.layer.weight)


def test_one_stream_uses_the_ordinary_backward() -> None:
    """So hooks of wrapped models run, and clipping before the step is what it always was."""
    ours, plain = Student(), Student()
    optimizer = MomentumOptimizer(SGD(ours.parameters(), lr=0.1, momentum=0.9), Shared())
    torch_s = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        for each, given in ((ours, optimizer), (plain, torch_s)):
            given.zero_grad()
            total = torch.stack([*each.losses(step).values()]).sum()
            given.backward({"all": total}) if each is ours else total.backward()
            clip_grad_norm_(each.parameters(), 0.5)
            given.step()
    assert same(ours, plain)


def test_after_zero_grad_a_foreign_gradient_is_forgotten() -> None:
    student, other = Student(), Student()
    optimizer, plain = begun(student), begun(other)
    student.losses(0)["task"].backward()
    optimizer.zero_grad()
    for each, given in ((student, optimizer), (other, plain)):
        given.backward(each.losses(1))
        given.step()
    assert same(student, other)


def test_buckets_keep_the_order_and_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_gradients, "_BUCKET", 10)
    sizes = [(4, torch.float32), (6, torch.float32), (1, torch.float32), (1, torch.bfloat16)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in [*sizes, (30, torch.bfloat16)]]
    buckets = list(stream_gradients._buckets(tensors))
    assert [[tensor.numel() for tensor in bucket] for bucket in buckets] == [[4, 6], [1], [1], [30]]
    together = [tensor for bucket in buckets for tensor in bucket]
    assert all(one is other for one, other in zip(together, tensors, strict=True))


def test_gradients_that_autograd_shares_are_changed_apart() -> None:
    """It gives one tensor for two weights that are added, and one number for a summed weight."""
    found = []
    for one in (lambda weight: weight, lambda weight: weight * 1.0):
        pair = [nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(3))]
        optimizer = MomentumOptimizer(SGD(pair, lr=0.1), DeepKDMomentum(mu=0.5))
        for _ in range(2):
            total = one(pair[0]) + one(pair[1])
            optimizer.backward({"task": total.sum(), "kd": (total**2).sum()})
            optimizer.step()
        found.append(pair)
    for shared, apart in zip(*found, strict=True):
        assert torch.allclose(shared, apart)
