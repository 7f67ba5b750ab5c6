"""How good a written answer is beside the right one: the one definition of each figure."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_MARK = "####"


def rouge_l(answer: str, reference: str) -> float:
    """The F-measure of ROUGE-L, in [0, 1], as rouge-score computes it with Porter's stemmer.

    Its words are runs of a-z and 0-9 after lower-casing; the longest common subsequence of words
    makes precision and recall. An answer without words scores 0.
    """
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def exact_match(answer: str, reference: str) -> float:
    """1 where both have the same `final_number`, else 0."""
    found = final_number(answer)
    return float(found is not None and found == final_number(reference))


def final_number(text: str) -> Decimal | None:
    """The first number after the last ``####``; of a text without that mark, its last number.

    A number is digits, in groups of three if commas part them, with or without a decimal part, a
    minus that follows no letter or digit, and a dollar sign after the minus. Commas, the dollar
    sign and a trailing dot do not count, and 18 equals 18.00. None when there is no number.
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
    from rouge_score.rouge_scorer import RougeScorer  # heavy, and few runs ask for it

    return RougeScorer(["rougeL"], use_stemmer=True)
