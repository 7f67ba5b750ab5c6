"""The optimizer for other loops: a wrong order of calls and wrong losses are told."""

from __future__ import annotations

from typing import Any

import pytest
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from kdcore import MomentumOptimizer, UserError
from kdcore_deepkd import DeepKDMomentum
from tests.kdcore.training.momentum.student_of_terms import Student, begun


@pytest.mark.parametrize(
    "calls, cause",
    [
        ("step", "backward was not called since the last step or zero_grad"),
        ("backward zero_grad step", "backward was not called since the last step or zero_grad"),
        ("backward step step", "backward was not called since the last step or zero_grad"),
        ("loss backward", "changed by something else than optimizer.backward"),
        ("backward loss step", "changed by something else than optimizer.backward"),
        ("backward loss backward", "changed by something else than optimizer.backward"),
        ("backward clip step", "changed by something else than optimizer.backward"),
        ("backward combine clip step", "changed between combine and step, and clipping it is"),
        ("backward combine backward", "backward was called between combine and step"),
        ("backward combine zero_grad", "zero_grad was called between combine and step"),
        ("backward freeze backward", "parameters were added, frozen or unfrozen"),
        ("backward cycle step", "policy and optimizer would both apply momentum"),
    ],
)
def test_a_wrong_order_is_told(calls: str, cause: str) -> None:
    student = Student()
    optimizer = begun(student)
    actions = {
        "step": optimizer.step,
        "backward": lambda: optimizer.backward(student.losses(0)),
        "combine": optimizer.combine,
        "zero_grad": optimizer.zero_grad,
        "loss": lambda: student.losses(0)["task"].backward(),
        "clip": lambda: clip_grad_norm_(student.parameters(), 1e-3),
        "freeze": lambda: student.unused.requires_grad_(False),
        "cycle": lambda: OneCycleLR(optimizer, max_lr=0.1, total_steps=9),
    }
    *before, last = calls.split()
    for call in before:
        actions[call]()
    with pytest.raises(UserError, match=cause) as wrong:
        actions[last]()
    assert "\n" not in wrong.value.cause and "\n" not in wrong.value.cure


@pytest.mark.parametrize(
    "change, cause",
    [
        (lambda losses: losses.pop("task"), "the loss 'task' is missing"),
        (lambda losses: losses.update(targt=losses["target"]), "unknown loss 'targt'"),
        (lambda losses: losses.update(task=losses["task"].detach()), "'task' is not a scalar with"),
        (lambda losses: losses.update(task=losses["task"].expand(2)), "'task' is not a scalar wi"),
    ],
)
def test_wrong_losses_are_told(change: Any, cause: str) -> None:
    student = Student()
    optimizer = begun(student)
    optimizer.backward(student.losses(0))
    losses = student.losses(1)
    change(losses)
    with pytest.raises(UserError, match=cause):
        optimizer.backward(losses)
    with pytest.raises(UserError, match=r"'a\+b' is not the name of a term"):
        begun(Student()).backward({"a+b": losses["target"]})


@pytest.mark.parametrize(
    "inner, cause",
    [
        (lambda parameters: SGD(parameters, lr=0.1, momentum=0.9), "both apply momentum"),
        (lambda parameters: SGD(parameters, lr=0.1, weight_decay=0.1), "both apply weight decay"),
        (AdamW, "gives the whole update, and AdamW would change it"),
    ],
)
def test_two_momenta_are_refused(inner: Any, cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        MomentumOptimizer(inner(Student().parameters()), DeepKDMomentum())


def test_the_state_of_another_optimizer_is_refused() -> None:
    student = Student()
    with pytest.raises(UserError, match="the state has no momentum buffers"):
        begun(student).load_state_dict(SGD(student.parameters(), lr=0.1).state_dict())
