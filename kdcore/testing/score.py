"""The conformance suite of scores of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdcore.data.responses.score import Answered
from kdcore.testing.suite import Suite

SAID = ("", "?", "18", "#### 18", "18 " * 50, "\ud800 \0 \n```\n", "It is $\\frac{1}{2}$.")
"""Answers of all kinds: empty, right, wrong, long, and not text."""


class ScoreSuite(Suite):
    """The checks of an `AnswerScore`.

    Attributes:
        reference: A reference answer that the score accepts.
        right: An answer to it that gets the best value.
        wrong: An answer to it that gets a worse value.
        fields: Fields of the row.
        values: The smallest and the largest value.
    """

    kind = "score"
    reference: ClassVar[str] = "so it is 18\n#### 18"
    right: ClassVar[str] = "so it is 18\n#### 18"
    wrong: ClassVar[str] = "none"
    fields: ClassVar[Mapping[str, Any]] = {}
    values: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def example(self, answer: str = "", place: int = 0) -> Answered:
        """Return an example with an answer."""
        turns = ({"role": "user", "content": "What is 9 + 9?"},)
        return Answered(f"row {place}", turns, answer, self.reference, self.fields)

    def score(self, said: Sequence[str]) -> list[float]:
        """Check the example, and score answers to it."""
        component = self.component()
        component.check(self.example())
        return [*component([self.example(answer, place) for place, answer in enumerate(said)])]

    def test_each_answer_gets_a_finite_value(self) -> None:
        """Models say anything, and a table shows the mean."""
        low, high = self.values
        found = self.score(SAID)
        assert len(found) == len(SAID), f"gave {len(found)} values for {len(SAID)} answers"
        for answer, value in zip(SAID, found, strict=True):
            assert math.isfinite(value), f"gave {value} for {answer!r}"
            assert low <= value <= high, f"gave {value} for {answer!r}, not within {self.values}"

    def test_no_answer_gives_no_value(self) -> None:
        """A process may have no prompt."""
        assert self.score([]) == [], "gave values without answers"

    def test_a_right_answer_is_better_than_a_wrong_one(self) -> None:
        """``better`` tells which values are better."""
        better = getattr(self.component(), "better", "higher")
        assert better in ("higher", "lower"), f"better is {better!r}"
        low, high = self.values
        right, wrong = self.score([self.right, self.wrong])
        assert right == (high if better == "higher" else low), f"the right answer gets {right}"
        assert right != wrong, f"the right answer and the wrong one get {right}"

    def test_answers_do_not_see_each_other(self) -> None:
        """Two models are compared row by row."""
        said = [self.right, self.wrong, ""]
        alone = [self.score([answer])[0] for answer in said]
        assert self.score(said) == alone, "a value depends on the other answers"
        assert self.score(said[::-1]) == alone[::-1], "a value depends on the order"

    def test_an_example_stays_as_it_is(self) -> None:
        """Several scores read the same examples."""
        component, asked = self.component(), self.example(self.right)
        turns = tuple(dict(turn) for turn in asked.turns)
        copy = replace(asked, turns=turns, fields=dict(asked.fields))
        component.check(asked)
        list(component([asked]))
        assert asked == copy, "changed the example"

    def test_its_figure_can_be_shown(self) -> None:
        """``title`` and ``format`` are those of a table."""
        component = self.component()
        title = getattr(component, "title", self.name)
        assert isinstance(title, str) and title, f"title is {title!r}"
        shown = getattr(component, "format", ".3f")
        try:
            text = format(0.5, shown)
        except (TypeError, ValueError) as fault:
            raise AssertionError(f"format {shown!r} cannot show a number: {fault}") from fault
        assert any(character.isdigit() for character in text), f"format {shown!r} shows no number"

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Score an answer."""
        answers = [self.example((self.right, self.wrong)[step % 2])]
        return [torch.tensor([*component(answers)], dtype=torch.float64)]
