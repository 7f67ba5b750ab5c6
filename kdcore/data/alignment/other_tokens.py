"""A sampled response of one tokenizer in the tokens of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from kdcore.data.alignment.token_bytes import TokenBytes


class OtherTokens:
    """Writes a teacher's tokens of responses that a student with another tokenizer samples.

    A response of the data stands in the same place of a row, in the tokens of both. It shows what
    the chat template of each writes there: a space before the text, and an end token.

    Args:
        ours: The bytes of the student's tokens.
        tokenizer: The teacher's tokenizer.
        theirs: The bytes of the teacher's tokens.
        known: Responses of the data in the teacher's tokens. The special token that ends most of
            them ends the sampled ones, too.
    """

    def __init__(
        self,
        ours: TokenBytes,
        tokenizer: Any,
        theirs: TokenBytes,
        known: Iterable[Sequence[int]],
    ) -> None:
        self._ours, self._tokenizer, self._theirs = ours, tokenizer, theirs
        last = (response[-1:] for response in known)
        ends = Counter(token for tokens in last for token in tokens if theirs(tokens) == [None])
        self._end = [token for token, _ in ends.most_common(1)]

    def __call__(
        self, response: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
    ) -> list[int]:
        """Write a response in the teacher's tokens.

        The first special token of the response, which mostly ends it, becomes the teacher's end
        token. What follows it is left out, as special tokens have no text.

        Args:
            response: The student's tokens.
            ours: A response of the data in the student's tokens, at the same place of a row.
            theirs: The same in the teacher's tokens.

        Returns:
            The teacher's tokens, at least one.
        """
        pieces = [*takewhile(lambda piece: piece is not None, self._ours(response))]
        text = _text(pieces)
        first = _text(self._ours(ours[:1])), _text(self._theirs(theirs[:1]))
        our_space, their_space = (each.startswith(" ") for each in first)
        if our_space and not their_space:
            text = text.removeprefix(" ")
        elif their_space and not our_space:
            text = f" {text}"
        end = self._end if len(pieces) < len(response) else []
        return [*self._written(text), *end] or list(theirs[:1])  # which is compared with nothing

    def _written(self, text: str) -> list[int]:
        """The tokens of a text in the middle of a row.

        SentencePiece takes each text for the start of one, and puts a space before it: then the
        text is written without its own space, or behind a newline.
        """
        for tokens in (self._tokens(text), self._tokens(text.removeprefix(" "))):
            if _text(self._theirs(tokens)) == text:
                return tokens
        behind = self._tokens(f"\n{text}")
        for place in range(len(behind)):
            before, after = (_text(self._theirs(each)) for each in (behind[:place], behind[place:]))
            if before.endswith("\n") and after == text:
                return behind[place:]
        return self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        """Tokens of a text alone: one that spells a special token does not become it."""
        read = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        tokens: list[int] = read["input_ids"]
        return tokens


def _text(pieces: Iterable[bytes | None]) -> str:
    return b"".join(piece or b"" for piece in pieces).decode(errors="replace")
