"""The scores of answers that a spec names, built and checked against the held-out examples."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdcore.components.choice import Choice
from kdcore.data.conversation import Conversation
from kdcore.data.ranks import ALONE, Ranks
from kdcore.data.responses.score import Answered, AnswerScore
from kdcore.data.templates.thoughts import PLAIN, thoughts_of
from kdcore.errors import UserError, in_field
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import Metric


@dataclass(frozen=True)
class Scores:
    """Scores, and the examples whose answers they score.

    Attributes:
        of: Name -> score.
        prompts: The examples; empty without a score.
        ranks: The processes of the run; the main one scores.
        tokenizer: The tokenizer by whose chat template thoughts in references are found, beside
            `PLAIN` ones (default: none).
    """

    of: Mapping[str, AnswerScore] = field(default_factory=dict)
    prompts: Sequence[Conversation] = ()
    ranks: Ranks = ALONE
    tokenizer: Any = None

    @classmethod
    def build(
        cls,
        choices: Sequence[Choice],
        build: Callable[[Choice], Any],
        examples: Sequence[Any],
        ranks: Ranks = ALONE,
    ) -> Scores:
        """Build scores, and check that they can score answers to the examples.

        Args:
            choices: The scores that ``evaluation.answers`` names.
            build: Builds a component.
            examples: The held-out examples.
            ranks: The processes of the run.

        Returns:
            The scores.

        Raises:
            UserError: A score cannot be built, an example is not a conversation or lacks its
                response, or a score refuses it.
        """
        if not choices:
            return cls()
        return cls({choice.name: build(choice) for choice in choices}, examples, ranks)._checked()

    def of_one(self, name: str, examples: Sequence[Any]) -> Scores:
        """Return one of the scores with other examples. Raises UserError as `build` does."""
        return replace(self, of={name: self.of[name]}, prompts=examples)._checked()

    @in_field("evaluation.answers")
    def read_by(self, tokenizer: Any) -> Scores:
        """Read the references by the chat template of a model, and check those that change.

        Args:
            tokenizer: The tokenizer of the model that answers.

        Returns:
            The scores.

        Raises:
            UserError: A reference consists of a thought, a score refuses it, or the tokenizer lacks
                a chat template.
        """
        return replace(self, tokenizer=tokenizer)._checked(self) if self.of else self

    def _checked(self, before: Scores | None = None) -> Scores:
        """Check each example, or only those that scores checked before read in another way."""
        for example in self.prompts:
            asked = _example(example, self.tokenizer)
            if before is not None and asked == _example(example, before.tokenizer):
                continue  # a check may parse formulas, or compile tests
            for score in self.of.values():
                score.check(asked)
        return self

    @property
    def metrics(self) -> list[Metric]:
        """How tables show the figures of the scores."""
        return [
            Metric(
                name,
                getattr(score, "title", name),
                getattr(score, "format", ".3f"),
                getattr(score, "better", "higher"),
            )
            for name, score in self.of.items()
        ]

    def __call__(
        self, said: Sequence[str], progress: Progress | None = None
    ) -> dict[str, list[float]]:
        """Score the answers to the prompts.

        Args:
            said: One answer for each prompt, in order.
            progress: The display of the scores that give their values one by one (default: none).

        Returns:
            Score -> its value for each answer.

        Raises:
            UserError: A score fails, or does not give a finite value for each answer.
        """
        answered = [
            replace(_example(prompt, self.tokenizer), answer=trimmed(answer))
            for prompt, answer in zip(self.prompts, said, strict=True)
        ]
        return self.ranks.by_main(
            lambda: {
                name: _values(name, score, answered, progress or Silent())
                for name, score in self.of.items()
            }
        )


def _values(
    name: str, score: AnswerScore, answered: Sequence[Answered], progress: Progress
) -> list[float]:
    given = score(answered)
    values = []
    shown = progress if isinstance(given, Iterator) else Silent()  # a list is complete already
    with shown.stage(f"{name} of the answers", len(answered)) as stage:
        for value in given:
            values.append(float(value))
            stage.advance()
    if len(values) != len(answered) or not all(map(math.isfinite, values)):
        raise UserError(
            f"score '{name}' gave {len(values)} values for {len(answered)} answers, or a value "
            "that is not finite",
            "report it to the plugin's author, or remove it from evaluation.answers",
        )
    return values


def trimmed(text: str) -> str:
    """A text without blank lines around it; the blanks of its first line may indent code."""
    return re.sub(r"\A\s*\n", "", text).rstrip()


@in_field("evaluation.answers")
def _example(example: Any, tokenizer: Any) -> Answered:
    """The prompt of the last response, and that response as reference. Raises UserError."""
    if not isinstance(example, Conversation):
        raise UserError(
            f"evaluation.answers scores answers in conversations, and {example.id} is not a "
            "conversation",
            "remove evaluation.answers; the accuracy of a classifier is always measured",
        )
    *before, last = example.messages
    if example.needs_response or last.role != "assistant":
        raise UserError(
            f"evaluation.answers needs a reference answer, and {example.id} lacks a response",
            "add the correct response to each held-out row, or remove evaluation.answers",
        )
    thoughts = PLAIN if tokenizer is None else thoughts_of(example, tokenizer)
    reference = trimmed(thoughts.reference_in(last.content))
    if not reference:
        raise UserError(
            f"evaluation.answers compares texts, and the last response of {example.id} has none",
            "leave out held-out rows that end with a tool call or a thought, or remove "
            "evaluation.answers",
        )
    turns = tuple({"role": turn.role, "content": turn.content} for turn in before)
    return Answered(example.id, turns, "", reference, example.kept)
