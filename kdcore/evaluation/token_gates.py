"""Gate weights of the tokens of a few held-out responses, with both models' likeliest tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdcore.method.gating import accepted_share
from kdcore.method.logits import HiddenLogits, TeacherLogits
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Batch
from kdcore.models.facts import token_texts
from kdcore.runs.results import Choices, GatedResponse, GatedToken

ROWS = 4
"""Maximum number of responses."""
TOKENS = 256
"""Maximum number of tokens per response."""
CHOICES = 5
"""Number of a model's likeliest tokens that are stored."""


@torch.no_grad()
def judged_responses(
    engine: LossEngine,
    student: HiddenLogits,
    teacher: TeacherLogits,
    batch: Batch,
    *,
    ids: list[str],
    tokenizer: Any,
    generator: torch.Generator,
    reference: TeacherLogits | None = None,
) -> list[GatedResponse]:
    """Compute the gate weights of a batch's B rows as at the end of the training.

    The gates run as in a training step; ranked gates compare the positions of this batch.

    Args:
        engine: The loss engine with the gates.
        student: The student's logits at the masked positions.
        teacher: The teacher's logits at the masked positions.
        batch: The batch.
        ids: The ids of the rows.
        tokenizer: The tokenizer that decodes the tokens.
        generator: The generator of random gates.
        reference: The logits of the reference model, or None.

    Returns:
        One response for each row.
    """
    weights = engine.gate_weights(
        student, teacher, batch, progress=1.0, generator=generator, reference=reference
    )
    rows, places = batch.mask.nonzero(as_tuple=True)
    labels = batch.labels[batch.mask].tolist()
    ours = _choices(student, len(labels), engine.chunk, tokenizer)
    theirs = _choices(teacher, len(labels), engine.chunk, tokenizer)
    gates = engine.objective.gates
    by_gate = {label: each.tolist() for label, each in weights.items()}
    shares = [accepted_share(gates[label], each).tolist() for label, each in weights.items()]
    found = []
    for row, name in enumerate(ids):
        own = (rows == row).nonzero()[:TOKENS, 0].tolist()
        first = int(places[own[0]])
        tokens = []
        for n in own:
            given = {label: each[n] for label, each in by_gate.items()}
            (text,) = token_texts(tokenizer, [labels[n]])
            accepted, weight = math.prod(each[n] for each in shares), math.prod(given.values())
            tokens.append(GatedToken(text, accepted, weight, given, ours[n], theirs[n]))
        before = batch.inputs["input_ids"][row, : first + 1]
        found.append(GatedResponse(name, tokenizer.decode(before.tolist()), tokens))
    return found


def _choices(
    logits: HiddenLogits | TeacherLogits, count: int, chunk: int, tokenizer: Any
) -> list[Choices]:
    """The likeliest tokens with their probabilities at each of the N positions."""
    found: list[Choices] = []
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        every: Tensor = logits.logits(part).float().softmax(-1)
        best = every.topk(min(CHOICES, every.shape[-1]))
        for probabilities, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            words = token_texts(tokenizer, tokens)
            found.append(list(zip(words, probabilities, strict=True)))
    return found
