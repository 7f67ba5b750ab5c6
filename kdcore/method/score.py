"""The Protocol of scores of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from kdcore.method.records import Answered


@runtime_checkable
class AnswerScore(Protocol):
    """Scores the answers of a model to held-out prompts, for ``evaluation.answers``.

    Its figure has the component's name. A score may carry ``title`` (str, by default the name),
    ``format`` (str, by default ".3f") and ``better`` ("higher", the default, or "lower"), by which
    tables show the figure and compare its values.
    """

    def check(self, example: Answered) -> None:
        """Check an example before the run starts; its answer is empty.

        Args:
            example: The prompt and the reference answer.

        Raises:
            UserError: Answers to this example cannot be scored.
        """

    def __call__(self, answers: Sequence[Answered]) -> Sequence[float]:
        """Score each answer, independent of the others.

        Args:
            answers: Answers to examples that passed ``check``; empty and senseless ones too.

        Returns:
            One finite value for each answer, in order.
        """
