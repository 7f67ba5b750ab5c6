"""The text of answers of a model, printed while their tokens arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TextIO

from kdcore_cli.terminal.control_characters import escaped

_HALF = "\ufffd"
"""Replacement character that an incomplete character is decoded to."""


class AnswerText:
    """Decodes tokens and prints their text, once its characters are complete.

    The text of a token depends on the one before it: a tokenizer may omit the space of the first
    token. So new tokens are decoded together with those printed last. ``answered`` cuts a text at
    the end of the answer. A terminal gets control characters as escapes, a file or pipe the text
    as it is.
    """

    def __init__(self, file: TextIO, tokenizer: Any, answered: Callable[[str], str] = str) -> None:
        self.file, self.tokenizer, self.answered = file, tokenizer, answered
        self.shown = escaped if file.isatty() else str
        self.text = ""
        self.written: list[int] = []
        self.waiting: list[int] = []

    def put(self, tokens: Sequence[int]) -> None:
        """Print the text of further tokens, up to its last complete character."""
        self.waiting += tokens
        new = self._new()
        if new and not new.endswith(_HALF):
            self._write(new)
            self.written, self.waiting = self.waiting, []

    def end(self) -> None:
        """Print the remaining text and end the line."""
        self._write(self._new())
        print(flush=True, file=self.file)

    def _new(self) -> str:
        before, whole = map(self._decoded, (self.written, self.written + self.waiting))
        return whole[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        shown, self.text = len(self.text), self.answered(self.text + text)
        print(self.shown(self.text[shown:]), end="", flush=True, file=self.file)


def print_samples(texts: Sequence[AnswerText], rows: Sequence[Sequence[int]]) -> None:
    """Print several answers to one prompt, each below a line with its number.

    Args:
        texts: Their texts.
        rows: Their tokens.
    """
    for number, (text, tokens) in enumerate(zip(texts, rows, strict=True), start=1):
        print(f"--- sample {number} of {len(texts)} ---", file=text.file)
        text.put(tokens)
        text.end()
