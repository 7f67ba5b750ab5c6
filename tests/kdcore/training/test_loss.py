"""The bare loss against the formula it stands for, and over two micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcore.training.loss import DistillationLoss


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(11, (4, 7))
    labels[:, :3] = -100
    return torch.randn(4, 7, 11, requires_grad=True), torch.randn(4, 7, 11), labels


def test_equals_forward_kl_over_the_shifted_positions() -> None:
    student, teacher, labels = tensors()
    found = DistillationLoss(divergence="forward_kl", normalize="token")(student, teacher, labels)
    p, q = (x[:, 2:-1].log_softmax(-1) for x in (teacher, student))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("normalize", ["sequence", "token", "accepted"])
def test_two_micro_batches_give_the_gradient_of_one(normalize: str) -> None:
    student, teacher, labels = tensors()
    loss = DistillationLoss(gates=["speckd"], divergence="forward_kl", normalize=normalize)
    (whole,) = torch.autograd.grad(loss(student, teacher, labels), student)
    items = 16 if normalize == "token" else 4
    for half in (slice(0, 2), slice(2, 4)):
        loss(student[half], teacher[half], labels[half], num_items=items).backward()
    torch.testing.assert_close(student.grad, whole)


def test_logits_of_another_vocabulary_are_refused() -> None:
    student, teacher, labels = tensors()
    loss = DistillationLoss(divergence="forward_kl")
    with pytest.raises(ValueError, match=r"student \[4, 7, 11\], teacher \[4, 7, 10\]"):
        loss(student, teacher[..., :10], labels)
    with pytest.raises(ValueError, match=r"labels \[4, 6\]"):
        loss(student, teacher, labels[:, 1:])
