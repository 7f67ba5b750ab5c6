"""Figures of the current optimizer step, and their means since the last log line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from kdcore.errors import counted
from kdcore.method.loss_engine import StepLoss
from kdcore.models.device import sent, widened

ACCEPTANCE = "acceptance/"


class StepFigures:
    """Sums of a step's figures over its micro-batches and all processes.

    Args:
        accelerator: The Trainer's accelerator, which sums over processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._step: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self._steps = 0

    def add(self, step: StepLoss, prefix: str = "") -> None:
        """Add one micro-batch's share of the loss, its terms and the acceptance rates.

        Args:
            step: The losses.
            prefix: What the names begin with, but that of the loss, which is one sum.
        """
        for name, value in step.figures.items():
            name = name if name == "loss" else prefix + name
            self._step[name] = self._step.get(name, 0.0) + widened(value.detach())

    def count(self, **counts: float) -> None:
        """Add costs of this process, such as seconds or tokens."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + value

    def of_step(self) -> dict[str, float]:
        """Close the step, and return its figures summed over processes."""
        values = torch.stack(list(self._step.values()))
        counts = list(self._counts.values())
        if self._accelerator.num_processes > 1:
            counted = torch.tensor(counts, dtype=values.dtype)
            values = torch.cat([values, sent(counted, values.device)])
            values, counts = self._accelerator.reduce(values, "sum"), []
        figures = dict(zip([*self._step, *self._counts], [*values.tolist(), *counts], strict=True))
        for name, value in figures.items():
            self._logged[name] = self._logged.get(name, 0.0) + value
        self._step, self._counts, self._steps = {}, {}, self._steps + 1
        return figures

    def logged(self) -> dict[str, float]:
        """Return the mean figures over the steps since the last call."""
        means = {name: value / max(self._steps, 1) for name, value in self._logged.items()}
        self._logged, self._steps = {}, 0
        return means


class IdleGates:
    """Finds the gates that accept nothing, so that nobody pays for a training without them.

    Args:
        tell: Receiver of one line for each such gate.
    """

    STEPS = 10
    """Steps after which a gate without any accepted token is told."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._steps = tell, 0
        self._accepted: dict[str, float] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """Count a step's figures."""
        self._steps += 1
        for name, value in figures.items():
            if name.startswith(ACCEPTANCE):
                self._accepted[name] = self._accepted.get(name, 0.0) + value
        if self._steps == self.STEPS:
            self._judge()

    def close(self) -> None:
        """Judge a training that was shorter."""
        if self._steps < self.STEPS:
            self._judge()

    def _judge(self) -> None:
        for name, accepted in self._accepted.items():
            if not accepted:
                self._tell(
                    f"warning: gate {name.removeprefix(ACCEPTANCE)} accepted no token in the first "
                    f"{counted(self._steps, 'step')}, so it lets nothing be learned; loosen its "
                    "parameters"
                )


STOPPING = "finishing this step and writing a checkpoint"


class StopWithCheckpoint(TrainerCallback):
    """Ends the training after a whole step, with a checkpoint, so that a resumed run loses nothing.

    Args:
        asked: Whether to stop.
    """

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        if self.asked():
            control.should_save = control.should_training_stop = True


class LogTheLast(TrainerCallback):
    """Makes the Trainer log the last step, so that the logged means cover all steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        control.should_log |= state.global_step >= state.max_steps


class StopWithoutGain(TrainerCallback):
    """Ends the training after some evaluations in a row without a better figure.

    It reads the evaluations from the log, which a checkpoint has, so that a resumed training stops
    at the same step.

    Args:
        figure: The figure.
        better: Whether lower or higher values are better.
        patience: Number of these evaluations.
    """

    def __init__(self, figure: str, better: str, patience: int) -> None:
        self._name, self._patience = f"eval_{figure}", patience
        self._best = min if better == "lower" else max

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        values = [each[self._name] for each in state.log_history if self._name in each]
        if values and len(values) - 1 - values.index(self._best(values)) >= self._patience:
            control.should_training_stop = True
