"""MiniLLM: its formula, the gradient of the KL of whole responses, and gates and cuts of a step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore.errors import UserError
from kdcore.method.logits import Head, HiddenLogits
from kdcore.method.loss_engine import LossEngine, StepLoss
from kdcore.method.records import Batch, LogitBatch, SampledTokens
from kdcore.testing.method.advantage import LENGTHS, AdvantageSuite
from kdcore.training.method import objective_of
from tests.plugins.logit_batches import build, random_logits
from tests.reference import minillm as reference

WHOLE = {"length_norm": False, "clip": None}
"""Without the paper's stabilisers, the estimator has no bias."""
VARIANTS: list[dict[str, Any]] = [
    {},
    WHOLE,
    {"own": True, "gamma": 0.9},
    {"length_norm": False, "gamma": 0.5, "clip": 0.1},
]


@pytest.mark.parametrize("params", VARIANTS)
def test_the_advantage_is_the_formula(params: dict[str, Any]) -> None:
    settings = {"length_norm": True, "own": False, "gamma": 1.0, "clip": 0.2} | params

    def formula(tokens: SampledTokens) -> Tensor:
        found = torch.zeros(tokens.mask.shape, dtype=torch.float64)
        for row, mask in enumerate(tokens.mask):
            rewards = (tokens.teacher - tokens.student)[row, mask].tolist()
            ratios = tokens.importance[row, mask].tolist()
            found[row, mask] = torch.tensor(reference.advantages(rewards, ratios, **settings))
        return found

    suite = type("MiniLLMSuite", (AdvantageSuite,), {"name": "minillm", "params": params})()
    suite.agrees_with(formula)
    assert max(LENGTHS) > 16, "a response must need several passes of the sum"


def step(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    share: float = 0.0,
    sampled: bool = True,
    chunk: int = 512,
    terms: dict[str, float] | None = None,
    streams: dict[str, tuple[str, ...]] | None = None,
    **rest: Any,
) -> StepLoss:
    """The loss engine on logits [B, T, V]: kd by the reverse KL, and the policy gradient.

    rest: of the objective, and the advantage's params as ``params``.
    """
    params, classes = rest.pop("params", {}), student.shape[-1]
    made = objective_of(
        rest.pop("gates", {}),
        [],
        build("divergence", "reverse_kl"),
        terms or {},
        advantage=build("advantage", "minillm", **params),
        **rest,
    )
    return LossEngine(made, streams or {"all": tuple(made.weights)}, chunk)(
        HiddenLogits(student[mask], Head(), classes),
        HiddenLogits(teacher[mask], Head(), classes),
        Batch({}, labels, mask, torch.arange(len(mask)), sampled=sampled, teacher_share=share),
        whole=1.0,
        progress=0.5,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize(
    ("terms", "params"),
    [({}, WHOLE), ({"kd": 0}, WHOLE | {"own": True})],
    ids=["decomposed", "by policy gradient alone"],
)
def test_the_mean_gradient_is_that_of_the_kl_of_whole_responses(
    terms: dict[str, float], params: dict[str, Any]
) -> None:
    """Over all responses of 3 tokens of 3 classes, weighted by the student's probability."""
    classes, length = 3, 3
    prefixes = [p for n in range(length) for p in itertools.product(range(classes), repeat=n)]
    student, teacher = (random_logits(seed, len(prefixes), classes) for seed in (1, 2))
    student.requires_grad_()
    kl, estimate = torch.zeros((), dtype=torch.float64), torch.zeros_like(student)
    for response in itertools.product(range(classes), repeat=length):
        places = [prefixes.index(response[:n]) for n in range(length)]
        logq, logp = (
            each.log_softmax(-1)[places, list(response)].sum() for each in (student, teacher)
        )
        kl = kl + logq.exp() * (logq - logp)
        found = step(
            student[None, places],
            teacher[None, places],
            torch.tensor([response]),
            torch.ones(1, length, dtype=torch.bool),
            terms=terms,
            params=params,
            normalize="token",
        )
        (gradient,) = torch.autograd.grad(found.losses["all"], student)
        estimate += logq.detach().exp() * gradient
    (expected,) = torch.autograd.grad(kl, student)
    torch.testing.assert_close(estimate, expected, rtol=1e-5, atol=1e-6)


def responses(seed: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [B, T, V] of both models, labels and mask of responses of 6, 1 and 3 tokens."""
    student, teacher = (random_logits(seed + i, 3, 9, 7) for i in (0, 1))
    labels = torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(9) >= 2) & (torch.arange(9) < torch.tensor([[8], [3], [5]]))
    return student.requires_grad_(), teacher, labels, mask


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("normalize", ["sequence", "token", "accepted"])
def test_loss_and_gradient_are_the_formulas(share: float, normalize: str) -> None:
    """Importance weighs both terms; ``accepted`` divides by its sum over each response."""
    student, teacher, labels, mask = responses()
    found = step(student, teacher, labels, mask, share=share, normalize=normalize)
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
    known = logq.detach(), logp
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        places = mask[row].nonzero()[:, 0].tolist()
        of_labels = [[float(each[row, t, labels[row, t]]) for each in known] for t in places]
        ratios = [reference.importance(q, p, share) for q, p in of_labels]
        each = reference.advantages(
            [p - q for q, p in of_labels], ratios, length_norm=True, own=False, gamma=1, clip=0.2
        )
        divided_by = {"sequence": len(places), "token": 1, "accepted": np.sum(ratios)}[normalize]
        for t, ratio, advantage in zip(places, ratios, each, strict=True):
            single = (logq[row, t].exp() * (logq[row, t] - logp[row, t])).sum()
            long = -advantage * logq[row, t, labels[row, t]]
            expected = expected + ratio * (single + long) / divided_by
    assert found.losses["all"].item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found.losses["all"], student)
    (slope,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6)
    assert found.terms.keys() == {"kd", "policy"} and not found.acceptance


@pytest.mark.parametrize("gate", ["all", "se_kd", "entropy"])
def test_a_step_does_not_depend_on_its_cuts(gate: str) -> None:
    """Chunks, padding, micro-batches, and a stream for each term."""
    student, teacher, labels, mask = responses()
    given: dict[str, Any] = {"share": 0.3, "gates": {gate: build("gate", gate)}}

    def gradient(losses: Any) -> Tensor:
        (found,) = torch.autograd.grad(sum(losses), student)
        return found

    whole = gradient(step(student, teacher, labels, mask, **given).losses.values())
    chunked = step(student, teacher, labels, mask, chunk=2, **given)
    torch.testing.assert_close(gradient(chunked.losses.values()), whole)
    apart = [
        step(*(each[[row]] for each in (student, teacher, labels, mask)), **given)
        for row in range(3)
    ]
    torch.testing.assert_close(gradient(each.losses["all"] for each in apart), whole)
    longer = [torch.cat([each, each], 1) for each in (student, teacher, labels)]
    padded = step(*longer, torch.cat([mask, torch.zeros_like(mask)], 1), **given)
    torch.testing.assert_close(gradient(padded.losses.values()), whole)
    two = step(student, teacher, labels, mask, streams={"a": ("kd",), "b": ("policy",)}, **given)
    torch.testing.assert_close(gradient(two.losses.values()), whole)
    assert two.losses["b"] != 0


def test_a_gate_hides_a_token_but_not_its_reward() -> None:
    student, teacher, labels, mask = responses()
    labels_of_last = torch.arange(9) == 7

    def all_but_the_last(batch: LogitBatch) -> Tensor:
        return (batch.position != 7).float()

    found = step(student, teacher, labels, mask, gates={"gate": all_but_the_last})
    (gradient,) = torch.autograd.grad(found.losses["all"], student)
    assert not gradient[:, labels_of_last].any()
    changed = teacher.clone()
    changed[0, 7, labels[0, 7]] += 1
    again = step(student, changed, labels, mask, gates={"gate": all_but_the_last})
    assert again.terms["policy"] != found.terms["policy"]
    assert again.terms["kd"] == found.terms["kd"]


def test_the_responses_of_the_data_have_no_policy_gradient() -> None:
    student, teacher, labels, mask = responses()
    given = step(student, teacher, labels, mask, share=0.3, sampled=False)
    without = step(student, teacher, labels, mask, terms={"policy": 0}, sampled=True)
    assert given.terms["policy"] == 0
    for made in (given, without):
        (gradient,) = torch.autograd.grad(made.losses["all"], student)
    assert torch.equal(given.losses["all"], without.losses["all"])
    assert gradient.any()


def test_a_student_that_equals_its_teacher_learns_nothing() -> None:
    _, teacher, labels, mask = responses()
    student = teacher.clone().requires_grad_()
    found = step(student, teacher, labels, mask, share=0.3)
    (gradient,) = torch.autograd.grad(found.losses["all"], student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("given", "got"), [(None, "type NoneType"), (torch.ones(9), "shape .9.")])
def test_an_advantage_of_the_wrong_shape_is_refused(given: Any, got: str) -> None:
    student, teacher, labels, mask = responses()
    made = objective_of(
        {}, [], build("divergence", "reverse_kl"), {}, advantage=lambda tokens: given
    )
    batch = Batch({}, labels, mask, torch.arange(3), sampled=True)
    logits = (HiddenLogits(each[mask], Head(), 7) for each in (student, teacher))
    with pytest.raises(UserError, match=rf"the advantage returned values of {got}, .* \[3, 9\]"):
        LossEngine(made, {"all": ("kd", "policy")}, 8)(
            *logits, batch, whole=1.0, progress=0.0, generator=torch.Generator()
        )
