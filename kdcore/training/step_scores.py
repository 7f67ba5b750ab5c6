"""The scores of an optimizer step that ranked gates remember."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_gather, get_world_size, is_initialized

from kdcore.method.loss_engine import StepLoss


class StepScores:
    """Collects the scores of the micro-batches of a step.

    Args:
        gates: Label -> gate. Only those with a method ``remember`` are told of their scores; see
            `kdcore.method.protocols.RankedGate`.
    """

    def __init__(self, gates: Mapping[str, Any]) -> None:
        self._gates = {label: gate for label, gate in gates.items() if hasattr(gate, "remember")}
        self._scores: dict[str, list[Tensor]] = {label: [] for label in self._gates}

    def add(self, step: StepLoss) -> None:
        """Add the scores of a micro-batch of training rows."""
        for label, scores in self._scores.items():
            scores.append(step.scores[label])

    def close(self) -> None:
        """End the step: the gates get its scores, those of all processes in their order."""
        for label, gate in self._gates.items():
            gate.remember(of_all_processes(torch.cat(self._scores[label])))
            self._scores[label] = []


def of_all_processes(values: Tensor) -> Tensor:
    """Concatenate tensors [M] of all processes, whose lengths may differ."""
    if not is_initialized() or get_world_size() == 1:
        return values
    counts = [values.new_zeros(1, dtype=torch.int64) for _ in range(get_world_size())]
    all_gather(counts, values.new_tensor([len(values)], dtype=torch.int64))
    longest = int(torch.cat(counts).max())
    every = [values.new_empty(longest) for _ in counts]
    all_gather(every, torch.nn.functional.pad(values, (0, longest - len(values))))
    return torch.cat([each[: int(n)] for each, n in zip(every, counts, strict=True)])
