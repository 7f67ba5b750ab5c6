"""The tokens of a text with responses in it, and which of them are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Response:
    """A response in a text: its place, whether it is learned, and its own tokens if known."""

    start: int
    end: int
    learned: bool = True
    tokens: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def tokens_of(
    text: str, responses: Sequence[Response], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Encode a text up to the end of its last response.

    A token that would cross the border of a response is split there.

    Args:
        text: The text.
        responses: The responses, in order.
        tokenizer: The tokenizer.

    Returns:
        Token ids, and for each whether it is learned.
    """
    borders = [0, *chain.from_iterable((each.start, each.end) for each in responses)]
    prefixes = [text[:border] for border in borders]
    before = tokenizer(prefixes, add_special_tokens=False, verbose=False)["input_ids"]
    if any(before[-1][: len(prefix)] != prefix for prefix in before):
        pieces = [ids_of(text[start:end], tokenizer) for start, end in pairwise(borders)]
    else:
        pieces = [before[-1][len(start) : len(end)] for start, end in pairwise(before)]
    ids: list[int] = []
    learned: list[bool] = []
    for lead, piece, each in zip(pieces[::2], pieces[1::2], responses, strict=True):
        said = list(each.tokens) or piece
        ids += [*lead, *said]
        learned += [False] * len(lead) + [each.learned] * len(said)
    return ids, learned


def ids_of(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text, with its special tokens and no others."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, or an empty list."""
    whole: list[int] = tokenizer("a")["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return [] if whole[: len(plain)] == plain else whole[:1]  # some only append an end token
