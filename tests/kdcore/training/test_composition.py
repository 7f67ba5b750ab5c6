"""Every gate x divergence x splitter, over policies and kinds of rows, two steps each."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.method.logits import Head, HiddenLogits
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Batch
from kdcore.models.assembly import Assembly
from kdcore.specs.parts.student_method import StudentMethodSpec
from kdcore.training.method import build_objective

CLASSES, WIDTH = 11, 6
NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("gate", "random"): {"rate": 0.5},
    ("gate", "uniform"): {"weight": 0.3},
    ("gate", "inverted"): {"gate": "speckd"},
    ("gate", "entropy"): {"threshold": 2.0},
    ("gate", "adaspec"): {"reference": "its logits are given below"},
    ("splitter", "by_position"): {"positions": 3},
}
"""What a component cannot be built without."""

ROWS = {"language model": (2, 5), "classifier": (6, 1), "drafter": (3, 3)}
"""Of each kind: B, T. Two chunks of positions: more would repeat what the second one shows."""


def every(kind: str) -> list[dict[str, Any]]:
    names = installed().names(kind)
    return [{"name": name, **NEEDED.get((kind, name), {})} for name in names]


def steps(method: dict[str, Any], rows: int, length: int) -> None:
    """Two optimizer steps, the policy's state carried over through a fresh policy."""
    spec = StudentMethodSpec.model_validate(method)
    assembly = Assembly(installed())
    objective = build_objective(spec, assembly)
    generator = torch.Generator().manual_seed(0)
    body = torch.randn(rows, length, WIDTH, generator=generator).requires_grad_()
    head = torch.randn(CLASSES, WIDTH, generator=generator).requires_grad_()
    teacher = torch.randn(rows, length, CLASSES, generator=generator) * 3
    reference = torch.randn(rows, length, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[0, 1:] = False
    batch = Batch({}, labels, mask, torch.arange(rows))
    state: dict[str, Any] = {}
    for step in range(2):
        policy = assembly.build(spec.momentum)
        if step:
            policy.load_state_dict(state)
        engine = LossEngine(objective, policy.streams(tuple(objective.weights)), chunk=4)
        found = engine(
            HiddenLogits(body[mask], Head(head), CLASSES),
            HiddenLogits(teacher[mask], Head(), CLASSES),
            batch,
            whole=float(rows),
            progress=step / 2,
            generator=generator,
            reference=HiddenLogits(reference[mask], Head(), CLASSES)
            if objective.reference
            else None,
        )
        gradients = {
            stream: list(torch.autograd.grad(loss, (body, head), retain_graph=True))
            for stream, loss in found.losses.items()
        }
        update = policy.combine(gradients, (body, head))
        with torch.no_grad():
            for weight, change in zip((body, head), update, strict=True):
                assert change.isfinite().all()
                weight -= 0.1 * change
        figures = {name: float(value) for name, value in found.figures.items()}
        objective.step_done(figures | {"progress": step / 2})
        for component in objective.stateful.values():
            component.load_state_dict(component.state_dict())
        state = policy.state_dict()


SHARES = list(itertools.product([choice["name"] for choice in every("momentum")], ROWS))
"""Momentum policy and kind of rows of each share of the product."""


@pytest.mark.parametrize("share", range(len(SHARES)), ids=[" ".join(pair) for pair in SHARES])
def test_the_full_product_runs_finite_and_resumes(share: int) -> None:
    """A policy sees gradients by stream, and streams come from the splitters alone.

    So each gate x divergence x splitter runs once, and the shares are dealt such that every gate,
    divergence and splitter meets every policy and every kind of rows.
    """
    momentum, kind = SHARES[share]
    numbered = [list(enumerate(every(part))) for part in ("gate", "divergence", "splitter")]
    dealt = [
        tuple(choice for _, choice in parts)
        for parts in itertools.product(*numbered)
        if sum(number for number, _ in parts) % len(SHARES) == share
    ]
    for place, known in enumerate(numbered):
        assert all(any(each[place] is choice for each in dealt) for _, choice in known)
    refused = set()
    for gate, divergence, splitter in dealt:
        method = {
            "gates": [gate],
            "divergence": divergence,
            "splitters": [splitter],
            "momentum": momentum,
            "terms": {"task": 0.5},
        }
        try:
            steps(method, *ROWS[kind])
        except UserError:
            refused.add(splitter["name"])
        except Exception as fault:
            raise AssertionError(f"{method} failed") from fault
    # Only top_k_mask may refuse, which by itself has no part 'non_target' to mask.
    assert refused == {"top_k_mask"}
