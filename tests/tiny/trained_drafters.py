"""Drafters with weights, bound to tiny targets, and what they did in decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.data.batching.anchors import at_anchors, known
from kdcore.data.rows import batch_of as as_batch
from kdcore.data.rows import collate
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Batch, Row
from kdcore.models.assembly import Assembly
from kdcore.specs.parts.training import MethodSpec
from kdcore.training.method import build_objective
from kdcore.training.views import DrafterView
from kdcore_baselines.verifiers import Greedy
from tests.tiny.targets import padded, prompts, tokenizer_of


def unbound(name: str, **params: object) -> Any:
    model = installed().component("drafter", name).params
    return Assembly(installed()).build(Choice("drafter", name, model(**params)))


def bound(name: str, target: PreTrainedModel, seed: int = 0, **params: object) -> Any:
    """With weights larger than a new drafter's, so that all of them matter."""
    torch.manual_seed(seed)
    drafter = unbound(name, **params).eval()
    drafter.bind(target, tokenizer_of())
    with torch.no_grad():
        for weight in drafter.parameters():
            weight += 0.2 * torch.randn(weight.shape)
    return drafter


@torch.inference_mode()
def proposed_at_once(drafter: Any, session: Session, row: list[int]) -> DraftTree:
    """The proposal after a row that drafter and target read in one pass."""
    whole, length = torch.tensor(row)[None], torch.tensor([len(row)])
    session.start(1)
    features = session.read(whole, length)
    drafter.start(whole[:, 0])
    tree: DraftTree = drafter.propose(whole[:, 1:], features[:, :-1], length - 1, None)
    return tree


def batch_of(rows: list[list[int]]) -> Batch:
    """Right-padded sequences without labels."""
    ids, mask = padded(rows, "right")
    none = torch.zeros_like(ids)
    return Batch({"input_ids": ids, "attention_mask": mask}, none, none.bool(), none[:, 0])


def hidden_in_training(drafter: Any, target: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """[B, T, D, H]."""
    batch = batch_of(rows)
    features, _ = DrafterView(target, drafter).read(batch)
    return drafter(batch.inputs["input_ids"], features)


def decode(
    drafter: Any, target: PreTrainedModel, rows: list[list[int]], count: int
) -> list[list[int]]:
    decoder = Decoder(target, drafter, Greedy(None, None))
    return decoder.generate(*padded(rows), Stop(count))


def losses(
    drafter: Any, target: PreTrainedModel, method: dict[str, Any], steps: int = 12
) -> list[float]:
    """The whole loss at each step of training on three rows, by Adam or the method's momentum."""
    spec = MethodSpec.model_validate(method)
    assembly = Assembly(installed())
    objective, policy = build_objective(spec, assembly), assembly.build(spec.momentum)
    engine = LossEngine(objective, policy.streams(tuple(objective.weights)), chunk=16)
    view = DrafterView(target, drafter)
    batch = anchored(prompts(3), drafter)
    weights = list(drafter.parameters())
    plain = torch.optim.SGD(weights, lr=0.02)
    optimizer = plain if policy.owns_momentum else torch.optim.Adam(weights, lr=2e-3)
    seen = []
    for _ in range(steps):
        step = engine(
            *view(drafter, batch),
            batch,
            whole=float(batch.mask.any(1).sum()),
            progress=0.5,
            generator=torch.Generator().manual_seed(0),
        )
        gradients = {
            stream: torch.autograd.grad(loss, weights, retain_graph=True)
            for stream, loss in step.losses.items()
        }
        for weight, grad in zip(weights, policy.combine(gradients, weights), strict=True):
            weight.grad = grad
        optimizer.step()
        seen.append(sum(float(loss.detach()) for loss in step.losses.values()))
    return seen


def anchored(rows: list[list[int]], drafter: Any) -> Batch:
    """Every token of the rows is learned, but for those that the drafter cannot propose."""
    encoded = []
    for index, row in enumerate(rows):
        ids = torch.tensor(row)
        mask = torch.arange(len(row)) < len(row) - 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        encoded.append((index, Row(inputs, ids.roll(-1), mask, str(index))))
    rows_padded = collate(encoded, {"input_ids": 0, "attention_mask": 0})
    return as_batch(known(at_anchors(rows_padded, drafter.depth, drafter.vocabulary)))
