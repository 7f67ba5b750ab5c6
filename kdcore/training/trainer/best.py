"""The best model of a training by a held-out figure, kept in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerState

from kdcore.errors import UserError, nearest
from kdcore.runs.folder import Run
from kdcore.runs.results import FIRST_MEASUREMENT, HeldOutResults, Metric
from kdcore.training.trainer import checkpoint as checkpoint_state

KEEP_BEST = "training.keep_best"
_BEST = "best.safetensors"


@dataclass(frozen=True, slots=True)
class BestModel:
    """The weights with the best value of a figure so far.

    Attributes:
        run: The run, whose folder holds them.
        figure: The figure.
        better: Whether lower or higher values are better.
        on: The rows of the figure, as messages name them.
        reported: Whether the results are reported on these rows too.
    """

    run: Run
    figure: str
    better: Literal["lower", "higher"]
    on: str
    reported: bool

    @classmethod
    def by(cls, run: Run, figure: str, known: Sequence[Metric], *, validation: bool) -> BestModel:
        """The best model by a figure.

        Args:
            run: The run.
            figure: The figure.
            known: The figures that choose.
            validation: Whether its rows are those of ``data.validation``, not of ``data.heldout``.

        Returns:
            The best model, which no evaluation has stored yet.

        Raises:
            UserError: The figure is not known.
        """
        metric = choosing_metric(figure, known)
        on = "data.validation" if validation else "data.heldout, the rows that are reported"
        return cls(run, figure, metric.better, on, not validation)

    @property
    def criterion(self) -> str:
        """What chose the model, as the card and the results say it."""
        return f"{self.figure} on {self.on}"

    def offer(self, found: HeldOutResults, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep weights if their figure is the best so far. Only the main process writes.

        Args:
            found: The measurement of the present weights.
            weights: Returns them by name, without two names of one tensor.

        Raises:
            UserError: The rows do not have the figure.
        """
        value = self.value(found.figures)
        path = self.run.path(_BEST)
        if not self.run.writes or (path.exists() and not self._improves(value)):
            return
        checkpoint_state.write(path, weights(), FIRST_MEASUREMENT.plain(found))

    def measured_at_end(self, state: TrainerState) -> bool:
        """Whether the last step was an evaluation, which offered its weights already.

        Args:
            state: State of the Trainer after the training.
        """
        last = [each for each in state.log_history if each["step"] == state.global_step]
        return any(f"eval_{self.figure}" in each for each in last)

    def value(self, figures: Mapping[str, float]) -> float:
        """Return the figure.

        Args:
            figures: Figure -> value, as measured.

        Returns:
            The value.

        Raises:
            UserError: The rows do not have the figure.
        """
        if self.figure not in figures:
            raise UserError(
                f"training.keep_best: the evaluation does not measure '{self.figure}'",
                nearest(self.figure, figures),
                KEEP_BEST,
            )
        return figures[self.figure]

    def read(self) -> tuple[dict[str, Tensor], HeldOutResults]:
        """Return the best weights so far, on the CPU, and their measurement."""
        weights, plain = checkpoint_state.read(self.run.path(_BEST))
        return weights, FIRST_MEASUREMENT.of_plain(plain)

    def _improves(self, value: float) -> bool:
        known = self.value(self.read()[1].figures)
        return value < known if self.better == "lower" else value > known


def choosing_metric(figure: str, known: Iterable[Metric]) -> Metric:
    """Find the metric that chooses the best model.

    Args:
        figure: The figure that ``training.keep_best`` names.
        known: The metrics that are measured.

    Returns:
        The metric.

    Raises:
        UserError: The figure is not among them.
    """
    metrics = {metric.name: metric for metric in known}
    if figure not in metrics:
        raise UserError(
            f"{KEEP_BEST}: unknown figure '{figure}'", nearest(figure, metrics), KEEP_BEST
        )
    return metrics[figure]


def changing_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that a training changes: trained parameters and buffers."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return trained | dict(model.named_buffers())


@torch.no_grad()
def load_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Write the tensors of `changing_weights` back into a model."""
    for name, tensor in changing_weights(model).items():
        tensor.copy_(weights[name])
