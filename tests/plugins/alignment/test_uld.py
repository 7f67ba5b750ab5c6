"""ULD and its merged spans: against float64, and through the loss engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdcore.data.alignment.paired_rows import PairedRows, PairedSource
from kdcore.data.alignment.spans import AlignedRow, Span
from kdcore.data.conversation import Conversation, Message
from kdcore.data.rows import RowDataset, batch_of, collate, padding
from kdcore.method.logits import ALIGNED
from kdcore.method.loss_engine import LossEngine, StepLoss
from kdcore.method.records import LOG_ZERO, Batch
from kdcore.testing.method.batches import example
from kdcore.training.method import objective_of
from kdcore.training.teachers.kinds import AlignedTeacher, LiveTeacher
from kdcore.training.views import StudentView
from kdcore_alignment import ULD
from kdcore_alignment.sorted_classes import descending
from kdcore_baselines import entropy, forward_kl, total_variation
from kdcore_baselines.sources.components import ChatParams
from kdcore_baselines.sources.files import ChatSource
from tests.reference.uld import of_span, sorted_distance
from tests.tiny.tiny_chat_models import OTHER_TEXT, tiny_tokenizer

TEXTS = ("the cat sat on the mat — and the dog", "a teacher", "in the house on the hill 日本")


@dataclass(frozen=True)
class Pair:
    """A teacher and a student with tokenizers of their own, and three rows."""

    teacher: Any
    student: Any
    view: StudentView
    batch: Batch
    rows: PairedRows


def model(classes: int, width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=classes,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def pair(alignment: Any, *, same_tokenizer: bool = False, same_model: bool = False) -> Pair:
    theirs = tiny_tokenizer()
    ours = theirs if same_tokenizer else tiny_tokenizer(text=OTHER_TEXT, size=276)
    teacher = model(len(theirs), 24, 0).requires_grad_(False)
    student = model(len(ours), 24 if same_model else 16, 0)
    source = PairedSource(
        ChatSource(ChatParams(path="unread.jsonl"), None), ours, theirs, alignment
    )
    messages = [(Message("user", "say it"), Message("assistant", text)) for text in TEXTS]
    rows = RowDataset(
        [source.encode(Conversation(str(n), each), ours, 200) for n, each in enumerate(messages)]
    )
    paired = PairedRows(source, rows, padding(theirs))
    live = LiveTeacher.of(teacher, len(theirs))
    view = StudentView(student, len(ours), AlignedTeacher(live, paired))
    batch = batch_of(collate([rows[n] for n in range(len(TEXTS))], padding(ours)))
    return Pair(teacher, student, view, batch, paired)


def loss(pair: Pair, merge: str, chunk: int = 512, *, tau: float = 1.0, **method: Any) -> StepLoss:
    objective = objective_of(
        method.pop("gates", {}),
        [ULD(merge=merge)],
        method.pop("divergence", None) or total_variation(),
        {"kd": 2.0},
        tau=tau,
        normalize="accepted",
    )
    engine = LossEngine(objective, {"all": tuple(objective.weights)}, chunk)
    return engine(
        *pair.view(pair.student, pair.batch, 0.0),
        pair.batch,
        whole=float(len(TEXTS)),
        progress=0.0,
        generator=torch.Generator().manual_seed(0),
    )


def spans_of(row: AlignedRow) -> list[Span]:
    """The compared spans of a row, from its tensors."""
    found = []
    for number in row.span[row.compared].tolist():
        ours = (row.span == number).nonzero()[:, 0]
        theirs = (row.own_span == number).nonzero()[:, 0]
        found.append(
            Span(range(int(ours[0]), int(ours[-1]) + 1), range(int(theirs[0]), int(theirs[-1]) + 1))
        )
    return found


@torch.no_grad()
def learned(model: Any, batch: Batch) -> list[tuple[np.ndarray[Any, Any], list[int]]]:
    """The float64 logits at the learned positions of each row, and the labels there."""
    logits = model(**batch.inputs).logits.double().numpy()
    return [
        (logits[n][mask.numpy()], batch.labels[n][mask].tolist())
        for n, mask in enumerate(batch.mask)
    ]


@pytest.mark.parametrize(
    ("alignment", "merge", "tau"),
    [
        ("positions", "none", 1.0),
        ("spans", "none", 2.0),
        ("spans", "product", 2.0),
        ("spans_last", "product", 1.0),
    ],
)
def test_the_loss_is_the_formula(alignment: Any, merge: str, tau: float) -> None:
    """The mean over rows of the mean over spans of sum_i |p_(i) - q_(i)|, times tau^2."""
    made = pair(alignment)
    base = -1 if alignment == "spans_last" else 0
    theirs = learned(made.teacher, batch_of(made.rows.collated(made.batch.index)))
    ours = learned(made.student, made.batch)
    expected = []
    for n, aligned in enumerate(made.rows.aligned_rows):
        spans = spans_of(aligned)
        several = any(len(each.ours) > 1 or len(each.theirs) > 1 for each in spans)
        assert several == (alignment != "positions") or n == 1
        distances = []
        for each in spans:
            sides = []
            for (logits, labels), place in ((theirs[n], each.theirs), (ours[n], each.ours)):
                of = logits[place.start : place.stop] / tau
                kept = [labels[t] for t in place]
                if merge == "none":
                    of, kept = of[[base]], kept[:1]
                sides.append(of_span(of, kept, base))
            distances.append(sorted_distance(*sides))
        expected.append(np.mean(distances))
    found = float(loss(made, merge, tau=tau).losses["all"].detach())
    assert found == pytest.approx(tau**2 * float(np.mean(expected)), rel=1e-5)


@pytest.mark.parametrize("merge", ["none", "product", "rest"])
def test_equal_models_have_no_loss(merge: str) -> None:
    made = pair("spans", same_tokenizer=True, same_model=True)
    step = loss(made, merge, divergence=forward_kl())
    assert float(step.losses["all"]) == pytest.approx(0, abs=1e-6)
    assert float(step.acceptance[ALIGNED]) == 1


@pytest.mark.parametrize("merge", ["none", "product", "rest"])
def test_the_length_of_a_chunk_does_not_matter(merge: str) -> None:
    """A chunk never ends inside a span, though it may be longer for it."""
    made = pair("spans_last")
    weights = list(made.student.parameters())
    found = [loss(made, merge, chunk).losses["all"] for chunk in (1, 5, 512)]
    grads = [torch.autograd.grad(each, weights) for each in found]
    for value, grad in zip(found, grads, strict=True):
        torch.testing.assert_close(value, found[-1], rtol=1e-5, atol=1e-6)
        for one, other in zip(grad, grads[-1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_rest_makes_merged_spans_a_distribution() -> None:
    """So a divergence is never negative, and the student's other tokens of a span learn as well."""
    made = pair("spans")
    weights = list(made.student.parameters())
    found = [loss(made, merge, divergence=forward_kl()).losses["all"] for merge in ("rest", "none")]
    assert min(map(float, found)) > 0
    grads = [torch.autograd.grad(each, weights)[0] for each in found]
    assert not torch.allclose(*grads)


def test_a_gate_multiplies_with_the_alignment() -> None:
    """The entropy gate reads the teacher's distribution at the compared position."""
    made = pair("spans")
    gates = {"entropy": entropy(threshold=None)}
    step = loss(made, "none", gates=gates)
    assert 0 < float(step.acceptance["entropy"]) < 1
    assert float(step.losses["all"]) != pytest.approx(float(loss(made, "none").losses["all"]))


def test_the_order_of_the_classes_does_not_matter() -> None:
    batch = example()
    order = torch.randperm(batch.teacher.shape[-1], generator=torch.Generator().manual_seed(3))
    moved = replace(batch, teacher=batch.teacher[..., order])
    ours = objective_of({}, [ULD()], total_variation(), {})
    gate = torch.ones_like(batch.labels, dtype=torch.float32)
    one, other = (ours.terms(each, gate)["kd"] for each in (batch, moved))
    torch.testing.assert_close(one, other)


def test_values_without_a_gradient_are_sorted_alike() -> None:
    """Which numpy does on a CPU, in less time: ties, a missing class and both zeros too."""
    logits = torch.randn(2, 3, 301).round(decimals=1)
    logits[0, 0, :3] = torch.tensor([LOG_ZERO, 0.0, -0.0])
    with_gradient = descending(logits.clone().requires_grad_())
    assert with_gradient.requires_grad
    assert torch.equal(descending(logits), with_gradient.detach())
    assert descending(logits).is_contiguous() and not len(descending(logits[:0]))
