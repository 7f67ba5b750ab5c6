"""The scores of an answer against a reference answer, each defined once."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

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


SCORES: Mapping[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l,
    "exact_match": exact_match,
}


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and few runs need it

    return RougeScorer(["rougeL"], use_stemmer=True)
