"""A learning rate that falls at milestones, a schedule that transformers does not have."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kdcore.specs.parts.training import TrainingSpec


@dataclass(frozen=True, slots=True)
class StepDecay:
    """Learning rate that falls at milestones, after a linear warm-up.

    Attributes:
        milestones: Shares of the training after which the learning rate falls.
        factor: Factor of the learning rate at each of them.
    """

    milestones: tuple[float, ...]
    factor: float

    @classmethod
    def of(cls, spec: TrainingSpec) -> StepDecay | None:
        """Return a spec's step decay, or None for another schedule."""
        if spec.schedule != "multi_step":
            return None
        return cls(tuple(spec.milestones), spec.milestone_factor)

    def scheduler(self, optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
        """Build the scheduler.

        Args:
            optimizer: Optimizer with the peak learning rate.
            warmup: Number of warm-up steps.
            steps: Number of steps of the training.

        Returns:
            The scheduler, whose state is plain numbers.
        """

        def factor(done: int) -> float:
            passed = sum(done >= round(share * steps) for share in self.milestones)
            warm = done / warmup if done < warmup else 1.0
            return warm * self.factor**passed

        return LambdaLR(optimizer, factor)
