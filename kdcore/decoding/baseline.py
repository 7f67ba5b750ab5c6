"""The extension point of baselines: other software that decodes, for `bench` to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from kdcore.decoding.loop import Counter
    from kdcore.models.loading.loaded import LoadedModel


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """The answers of one method to a batch of prompts.

    Attributes:
        tokens: Number of emitted tokens, including end tokens.
        answers: The tokens of each answer; None if a server does not return them.
        counter: Counts of rounds; None for a method that does not count them.
        seconds: Seconds of a server's answers; None if the time of the call is meant.
    """

    tokens: int
    answers: list[list[int]] | None
    counter: Counter | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, answers: list[list[int]], counter: Counter | None = None) -> DecodedBatch:
        """The batch of answers whose tokens are all known."""
        return cls(sum(map(len, answers)), answers, counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingSettings:
    """What all methods of a benchmark do alike.

    Attributes:
        batch_size: Maximum number of prompts of a batch.
        longest_prompt: Number of tokens of the longest prompt.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; 0 is greedy. Nothing else changes the distribution.
        ends: Ids of end tokens; an answer includes its end token.
        threads: Number of threads of a CPU.
    """

    batch_size: int
    longest_prompt: int
    max_new_tokens: int
    temperature: float
    ends: tuple[int, ...]
    threads: int

    def answer(self, tokens: Sequence[int]) -> list[int]:
        """Cut tokens after the first end token and at the maximum length.

        Args:
            tokens: New tokens.

        Returns:
            The answer.
        """
        kept = list(tokens[: self.max_new_tokens])
        ends = (place + 1 for place, token in enumerate(kept) if token in self.ends)
        return kept[: next(ends, None)]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Pad prompts on the left, as batched decoding needs.

    Args:
        prompts: Token ids of each of the B prompts.

    Returns:
        The tokens [B, T], padded with 0, and the mask [B, T], 1 for a real token.
    """
    lacking = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    return (
        [[0] * less + list(prompt) for less, prompt in zip(lacking, prompts, strict=True)],
        [[0] * less + [1] * len(prompt) for less, prompt in zip(lacking, prompts, strict=True)],
    )


@runtime_checkable
class Baseline(Protocol):
    """Decodes prompts by other software than kdcore's loop, with the target's weights.

    Prompts and answers are token ids, so that templates and tokenizers take no part.

    Attributes:
        digest: Digest of the files that it reads besides the target's, after ``bind``; None if it
            reads none. `bench` resumes with the same files only.
    """

    digest: str | None

    def bind(self, target: LoadedModel) -> None:
        """Prepare to decode with a target, for example convert its weights.

        Args:
            target: The target.

        Raises:
            UserError: The software is not installed, or cannot run the target.
        """

    def start(self, settings: DecodingSettings) -> None:
        """Prepare for batches with other settings.

        Args:
            settings: The settings of the following batches.

        Raises:
            UserError: The software does not support them.
        """

    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        """Answer prompts; one that takes a single prompt at a time answers them in turn.

        Args:
            prompts: Token ids of each prompt.
            seed: Sampling seed.

        Returns:
            The answers. `bench` measures the time of the call.
        """

    def close(self) -> None:
        """Free what the baseline holds; it is not used afterwards."""
