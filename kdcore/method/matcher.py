"""The extension point of matchers of hidden states. See `kdcore.method.protocols`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from kdcore.method.records import StateSizes


@runtime_checkable
class Matcher(Protocol):
    """Compares hidden states of student and teacher: a torch.nn.Module, which may have weights.

    Each matcher is a term of the loss with its own weight, to which the gates apply. Its weights
    are trained with the student's and stored in checkpoints; they are no part of the student that a
    run saves.

    Attributes:
        pairs: After ``bind``, the numbers of the hidden states that are compared: that of the
            student and that of the teacher, each as in `kdcore.method.records.StateSizes`.
    """

    pairs: tuple[tuple[int, int], ...]

    def bind(self, student: StateSizes, teacher: StateSizes) -> None:
        """Choose the pairs and create the weights, once, from torch's global generator.

        Args:
            student: The sizes of the student.
            teacher: The sizes of the teacher.

        Raises:
            UserError: The matcher names a hidden state that a model does not have.
        """

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Compute the distance at each position.

        Args:
            student: [N, H] hidden states of the student for each pair, with gradient.
            teacher: [N, H'] hidden states of the teacher for each pair, detached.

        Returns:
            [N] the distance, with gradient for the student's hidden states and the weights.
        """

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the weights, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Restore the weights of `state_dict`, after ``bind``."""
