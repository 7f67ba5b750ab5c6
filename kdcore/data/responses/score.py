"""The extension point of scores, and the record of an answer that they score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Answered:
    """A model's answer to a held-out prompt, beside the reference answer.

    Attributes:
        id: Name of the example in messages.
        turns: The turns before the answer as ``{"role": ..., "content": ...}``, the question last.
        answer: The model's answer without its thought; empty while the example alone is checked,
            and if the thought does not end.
        reference: The last response of the example without its thought; blank lines around it are
            left out, as in `answer`.
        fields: Further fields of the row, those that its source keeps.
    """

    id: str
    turns: tuple[Mapping[str, str], ...]
    answer: str
    reference: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The text of the turn that the answer replies to."""
        return self.turns[-1]["content"]


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

    def __call__(self, answers: Sequence[Answered]) -> Iterable[float]:
        """Score each answer, independent of the others.

        Args:
            answers: Answers to examples that passed ``check``; empty and senseless ones too.

        Returns:
            One finite value for each answer, in order. An iterator, which gives one after the
            other, has its progress shown.
        """
