"""What the classes of a tokenizer mean, so that those of two tokenizers can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcore.data.alignment.token_bytes import TokenBytes
from kdcore.method.objective import Objective


def meanings(tokenizer: Any) -> list[bytes | str]:
    """The meaning of each class of a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The text of each token as bytes; the name of a special token as a string.
    """
    every = range(len(tokenizer))
    names: Sequence[str] = tokenizer.convert_ids_to_tokens(list(every))
    texts = TokenBytes(tokenizer)(every)
    return [name if text is None else text for text, name in zip(texts, names, strict=True)]


def bind_splitters(objective: Objective, student: Any, teacher: Any) -> None:
    """Tell the splitters that compare classes by their meaning what the classes mean.

    Args:
        objective: The method.
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.
    """
    asking = [splitter for splitter in objective.splitters if hasattr(splitter, "bind")]
    if not asking:
        return
    ours, theirs = meanings(student), meanings(teacher)
    for splitter in asking:
        splitter.bind(ours, theirs)
