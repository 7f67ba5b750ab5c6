"""The bytes of text that each token of a tokenizer stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""The sign for a space in the tokens of SentencePiece."""


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    It covers byte-level tokenizers (GPT-2, Llama 3, Qwen) and those of SentencePiece (Llama 2,
    Gemma). For other tokenizers the bytes may be wrong, which the comparison of two texts shows.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = set(tokenizer.all_special_ids)
        self._special |= {number for number, token in added.items() if token.special}
        self._added: dict[int, str] = {number: token.content for number, token in added.items()}
        core = getattr(tokenizer, "backend_tokenizer", None)
        # the tokenizer says so in the JSON of its decoder, and of its pre-tokenizer
        self._by_bytes = core is not None and "ByteLevel" in f"{core.decoder}{core.pre_tokenizer}"
        self._known: dict[int, bytes | None] = {}

    def __call__(self, tokens: Sequence[int]) -> list[bytes | None]:
        """Look up tokens.

        Args:
            tokens: Token ids.

        Returns:
            The bytes of each token; None for a special token, such as an end token.
        """
        for token in set(tokens) - self._known.keys():
            self._known[token] = None if token in self._special else self._bytes(token)
        return [self._known[token] for token in tokens]

    def _bytes(self, token: int) -> bytes:
        text = self._added.get(token)
        if text is not None:
            return text.encode()
        piece: str = self._tokenizer.convert_ids_to_tokens(token) or ""
        if self._by_bytes:
            known = byte_of()
            return bytes(known[s] for s in piece) if known.keys() >= {*piece} else piece.encode()
        said = _BYTE.fullmatch(piece)
        if said:
            return bytes([int(said[1], 16)])
        return piece.replace(_SPACE, " ").encode()


@cache
def byte_of() -> dict[str, int]:
    """The byte that each sign of a byte-level vocabulary stands for, as GPT-2 chose them."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    signs = {chr(byte): byte for byte in printed}
    others = (byte for byte in range(256) if byte not in printed)
    return signs | {chr(256 + place): byte for place, byte in enumerate(others)}
