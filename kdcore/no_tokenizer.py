"""The neutral element among tokenizers."""

from __future__ import annotations

from typing import Any


class NoTokenizer:
    """What a model of images has where one of text has its tokenizer: no tokens, nothing to save.

    So whoever pads, compares vocabularies or saves need not ask which of both it is.
    """

    pad_token_id = eos_token_id = chat_template = None
    model_input_names = ("pixel_values",)

    def get_vocab(self) -> dict[str, int]:
        """No token."""
        return {}

    def save_pretrained(self, folder: Any) -> None:
        """Writes nothing."""
