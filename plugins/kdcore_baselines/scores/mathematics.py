"""Score of mathematical answers: whether two formulas are equal, by the package math-verify."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from kdcore import Answered, BuildContext, UserError, by_keywords
from kdcore.components.optional_packages import import_early, optional_package
from kdcore_baselines.scores.components import MathParams

math_verify: Any = import_early("math_verify")


class Mathematics:
    """Whether the final formula of an answer equals that of the reference.

    math-verify finds the formula, in a LaTeX box if there is one, and compares by value: 1/2 equals
    0.5. It stops a comparison after 5 s, which then counts as wrong.
    """

    title, format = "mathematical answers", ".1%"

    @by_keywords(MathParams)
    def __init__(self, params: MathParams, context: BuildContext) -> None:
        optional_package("math_verify", "kdcore[math]", "the score math")
        self._field = params.reference

    def check(self, example: Answered) -> None:
        """Refuse a reference without a formula or number."""
        if not self._expected(example):
            where = self._field or "response"
            raise UserError(
                f"math compares formulas, and math-verify finds none in the {where} of "
                f"{example.id}",
                "write the final answer in \\boxed{...}, name its field (keep of the source, "
                "reference of math), or remove math from evaluation.answers",
            )

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        return [
            float(math_verify.verify(self._expected(each), _formulas(each.answer)))
            for each in answers
        ]

    def _expected(self, example: Answered) -> list[Any]:
        if self._field is None:
            return _formulas(example.reference)
        said = kept_field(example, self._field, "math")
        return _formulas(f"\\boxed{{{said}}}")


def kept_field(example: Answered, field: str, score: str) -> Any:
    """Return a field of the row that a score reads.

    Args:
        example: The example.
        field: Name of the field.
        score: Name of the score in the message.

    Returns:
        The value.

    Raises:
        UserError: The source does not keep the field, or the row lacks it.
    """
    if field not in example.fields:
        raise UserError(
            f"{score} reads the field '{field}', which {example.id} lacks or the source does not "
            "keep",
            f"set keep: [{field}] in the source of the held-out rows",
        )
    return example.fields[field]


def _formulas(text: str) -> list[Any]:
    """The formulas that math-verify finds in a text, as it compares them."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "the score math limits the time of a comparison by a signal, which Python delivers to "
            "the main thread only",
            "call the evaluation from the main thread, or remove math from evaluation.answers",
        )
    found: list[Any] = math_verify.parse(text)
    return found
