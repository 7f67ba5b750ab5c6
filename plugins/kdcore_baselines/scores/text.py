"""Scores that compare the text of an answer with that of the reference answer."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from kdcore import Answered, BuildContext, Params, UserError, by_keywords

_NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_MARK = "####"


def rouge_l(answer: str, reference: str) -> float:
    """Compute the F-measure of ROUGE-L, as rouge-score does with Porter's stemmer.

    Words are runs of a-z and 0-9 after lower-casing; precision and recall come from the longest
    common subsequence of words. An answer without words scores 0.

    Args:
        answer: The model's answer.
        reference: The reference answer.

    Returns:
        The score, in [0, 1].
    """
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if answer and reference have the same `final_number`, else 0."""
    found = final_number(answer)
    return float(found is not None and found == final_number(reference))


def final_number(text: str) -> Decimal | None:
    """Find the first number after the last ``####``, or the last number without that mark.

    A number consists of digits, optionally in groups of three separated by commas, optionally with
    a decimal part, a minus that does not follow a letter or digit, and a dollar sign after the
    minus. Commas, the dollar sign and a trailing dot do not count, and 18 equals 18.00.

    Args:
        text: The text.

    Returns:
        The number, or None if the text does not contain one.
    """
    _, mark, after = text.rpartition(_MARK)
    found: list[str] = _NUMBER.findall(after)
    if not found:
        return None
    number = found[0] if mark else found[-1]
    return Decimal(number.replace(",", "").replace("$", ""))


class RougeL:
    """ROUGE-L of the whole answer; see `rouge_l`."""

    title = "ROUGE-L of the answers"

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def check(self, example: Answered) -> None:
        """Accept any example."""

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        return [rouge_l(each.answer, each.reference) for each in answers]


class ExactMatch:
    """Whether the final numbers are equal; see `exact_match`."""

    title, format = "exact match of the answers", ".1%"

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def check(self, example: Answered) -> None:
        """Refuse a reference without a number."""
        if final_number(example.reference) is None:
            raise UserError(
                f"exact_match compares numbers, and the response of {example.id} does not contain "
                "a number",
                "remove exact_match from evaluation.answers, or choose rows with numeric answers, "
                "e.g. GSM8K",
            )

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        return [exact_match(each.answer, each.reference) for each in answers]


@functools.cache
def _rouge() -> Any:
    return RougeScorer(["rougeL"], use_stemmer=True)
