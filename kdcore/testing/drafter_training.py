"""A few steps of training of a drafter with weights of its own, as `kdcore train-drafter` does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.data.anchors import at_anchors, known
from kdcore.data.collate import batch_of
from kdcore.testing import tiny_target
from kdcore.testing.tiny_target import CLASSES, PROMPTS
from kdcore.views import DrafterView, HiddenLogits

STEPS, RATE = 12, 3e-3


def assert_it_learns(drafter: Any, target: Any) -> None:
    """What a training of it must do, and what it must leave alone.

    drafter: bound to the target, whose parameters need no gradient. Steps of Adam on the forward KL
    from the target, at every anchor of a few rows and at every level.
    """
    assert_nothing_is_shared(drafter, target)
    padded, counts = _rows()
    drafter.choose_vocabulary(counts)
    batch = batch_of(known(at_anchors(padded, drafter.depth, drafter.vocabulary)))
    view = DrafterView(target, drafter)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    learned = {name: each for name, each in drafter.named_parameters() if each.requires_grad}
    assert learned, "none of its parameters is to be trained"
    optimizer = torch.optim.Adam(learned.values(), RATE)
    unreached, losses = set(learned), []
    drafter.train()
    for _ in range(STEPS):
        loss = _divergence(*view(drafter, batch))
        losses.append(float(loss.detach()))
        assert loss.requires_grad, "no gradient reaches any of its weights"
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        unreached -= {
            name for name, each in learned.items() if each.grad is not None and each.grad.any()
        }
        optimizer.step()
    assert not unreached, f"no gradient reaches {', '.join(sorted(unreached))}"
    assert losses[-1] < losses[0], f"the loss does not fall in {STEPS} steps: {losses}"
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), f"the training altered the target's {name}"


def assert_nothing_is_shared(drafter: Any, target: Any) -> None:
    """What it uses of the target is no parameter of it, nor stored with it."""
    theirs = {each.data_ptr(): name for name, each in target.named_parameters()}
    for name, each in drafter.state_dict().items():
        other = theirs.get(each.data_ptr())
        assert other is None, f"its {name} is the target's {other}"
    trainable = [name for name, each in target.named_parameters() if each.requires_grad]
    assert not trainable, f"it lets the target's {', '.join(trainable)} be trained"


def _rows() -> tuple[dict[str, Tensor], Tensor]:
    """Prompts and what the target says after them, right-padded; how often each token is due."""
    rows = [torch.tensor([*prompt, *tiny_target.following(tuple(prompt))]) for prompt in PROMPTS]
    whole = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5)
    lengths = torch.tensor([[len(row)] for row in rows])
    real = torch.arange(whole.shape[1]) < lengths
    padded = {
        "input_ids": whole[:, :-1],
        "attention_mask": real[:, :-1].long(),
        "labels": whole[:, 1:],
        "mask": real[:, 1:],
        "index": torch.arange(len(rows)),
    }
    return padded, torch.bincount(whole[:, 1:][real[:, 1:]], minlength=CLASSES)


def _divergence(drafted: HiddenLogits, target: HiddenLogits) -> Tensor:
    """Mean forward KL, in nats."""
    every = slice(None)
    student = drafted.differentiable(drafted.hidden, drafted.linear(every)).log_softmax(-1)
    teacher = target.logits(target.linear(every)).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
