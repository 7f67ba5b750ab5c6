"""The gates' weights of the masked positions, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from kdcore.errors import UserError, counted
from kdcore.method.positions import MaskedPositions
from kdcore.method.protocols import Gate, RankedGate
from kdcore.method.records import LogitBatch, of_shape


@torch.no_grad()
def gate_chunk(
    gates: Mapping[str, Any],
    logits: LogitBatch,
    chunk: slice,
    weights: Mapping[str, Tensor],
    generators: Mapping[str, Generator],
) -> None:
    """Ask each gate about one chunk.

    Args:
        gates: Label -> gate, without the ranked ones.
        logits: Logits of the C positions of the chunk, as B = 1.
        chunk: Place of the chunk among the N positions.
        weights: Label -> [N] the weights, which the gates fill at the place of the chunk.
        generators: Label -> generator of the gate.

    Raises:
        UserError: A gate does not return a tensor [1, C].
    """
    for label, gate in gates.items():
        found = gate(replace(logits, generator=generators[label]))
        weighed = of_shape(found, logits.mask.shape, f"gate '{label}'", "weights")
        weights[label][chunk] = weighed[0].to(weights[label].dtype)


@torch.no_grad()
def gate_all(
    gates: Mapping[str, Gate | RankedGate],
    positions: MaskedPositions,
    length: int,
    weights: dict[str, Tensor],
    generators: Mapping[str, Generator],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Ask each gate, ranked ones included, about all positions.

    Args:
        gates: Label -> gate.
        positions: The N positions.
        length: Number of positions of a chunk.
        weights: Label -> [N] the weights, which are replaced or filled.
        generators: Label -> generator of the gate.

    Returns:
        The factors [N] of the loss temperature, or None if no gate sets them; and label -> the
        scores [N] of a ranked gate.

    Raises:
        UserError: A gate does not return a tensor of the right shape.
    """
    ranked = {label: gate for label, gate in gates.items() if isinstance(gate, RankedGate)}
    plain = {label: gate for label, gate in gates.items() if not isinstance(gate, RankedGate)}
    for chunk in positions.chunks(length):
        gate_chunk(plain, chunk.logits, chunk.place, weights, generators)
        for label, gate in ranked.items():
            found = gate.score(replace(chunk.logits, generator=generators[label]))
            scores = of_shape(found, chunk.logits.mask.shape, f"gate '{label}'", "scores")
            weights[label][chunk.place] = scores[0].to(weights[label].dtype)
    softening, every = None, {label: weights[label] for label in ranked}
    for label, scores in every.items():
        weights[label], factors = _rank(label, ranked[label], scores, positions)
        if factors is not None:
            softening = factors if softening is None else softening * factors
    return softening, every


def _rank(
    label: str, gate: RankedGate, scores: Tensor, positions: MaskedPositions
) -> tuple[Tensor, Tensor | None]:
    """The second pass of a ranked gate: the weights [N], and the factors [N] or None."""
    by_row = getattr(gate, "within_rows", False)
    temperatures = getattr(gate, "temperatures", None)
    weights, factors = [scores[:0]], [scores[:0]]
    for those in torch.split(scores, positions.row_lengths) if by_row else [scores]:
        found = gate.weigh(those, positions.progress)
        weights.append(of_shape(found, those.shape, f"gate '{label}'", "weights"))
        if temperatures is not None:
            softened = temperatures(those, found)
            factors.append(of_shape(softened, those.shape, f"gate '{label}'", "temperatures"))
    return torch.cat(weights), None if temperatures is None else torch.cat(factors)


def accepted_share(gate: Gate | RankedGate | None, weight: Tensor) -> Tensor:
    """How far each position is accepted, in [0, 1]: 0 where its weight is the gate's floor."""
    floor = float(getattr(gate, "floor", 0.0))
    # with a floor of 1 all weights are 1, unless the gate is wrong
    return weight if floor == 1.0 else (weight - floor) / (1.0 - floor)


def outside_range(gate: Gate | RankedGate, weight: Tensor) -> Tensor:
    """The number of weights outside [floor, 1], as a scalar that the host has not read.

    Tolerates what rounding to bfloat16 does. A NaN is not counted: it makes the loss one.
    """
    slack = torch.finfo(torch.bfloat16).eps
    floor = float(getattr(gate, "floor", 0.0))
    return ((weight < floor - slack) | (weight > 1.0 + slack)).sum()


def refuse_outside(counts: Mapping[str, float], gates: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a gate gave weights outside its range.

    Args:
        counts: Label -> number of those weights.
        gates: Label -> gate.
        where: Place in the training, for the message.
    """
    for label, count in counts.items():
        if count:
            weights = counted(int(count), "weight")
            floor = float(getattr(gates[label], "floor", 0.0))
            raise UserError(
                f"gate '{label}' gave {weights} outside [{floor:g}, 1] {where}",
                "correct the gate; `kdcore plugins check PACKAGE` tests an installed one",
            )
