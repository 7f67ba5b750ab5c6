"""Responses that the student as it is now samples, in place of the data's, while it is trained.

    student      y_t ~ student(. | x, y_<t)                            GKD, arXiv 2306.13649
    interleaved  the same, but a y_t that is none of the teacher's top_k
                 likeliest is replaced by a y_t ~ teacher(. | x, y_<t)   SKD, arXiv 2410.11325

each at its temperature and cut at top_p; the top_k are of the teacher uncut.

The loss is then taken on these rows as on any; no gradient flows through the sampling. The two are
no kind of plugin: what they need (both models, mid-training, a cache each) no component is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcore.data.responses.continuation import continue_prompts, pick
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.specs.distill import OnPolicySpec

_EXTENDED = {"input_ids", "attention_mask"}


@dataclass(frozen=True, slots=True)
class Sampled:
    """Rows with sampled responses, and what sampling them came to.

    tokens: how many were sampled. replaced: how many of them are the teacher's.
    """

    rows: list[Row]
    tokens: int
    replaced: int


@dataclass(frozen=True)
class OnPolicy:
    """Gives rows other responses.

    rows: of the data, by their places. teacher: in eval mode; only the interleaved policy asks it.
    ends: tokens that end a response. classes: V, those that both models have. positions: the most
    that a row may have.

    Raises UserError for rows that are more than tokens.
    """

    spec: OnPolicySpec
    rows: Sequence[Row]
    teacher: Any
    ends: Sequence[int]
    classes: int
    positions: int

    def __post_init__(self) -> None:
        for name in self.rows[0].inputs.keys() - _EXTENDED:
            raise UserError(
                f"the rows have an input '{name}', which a sampled response has not",
                "use a source whose rows are tokens alone, or remove data.on_policy",
            )

    def __call__(self, student: Any, places: Sequence[int], generator: torch.Generator) -> Sampled:
        """The rows at some places, each with a response that the student samples as it is.

        student: in any mode, which it is put back into. generator: on its device.
        """
        prompts = [prompt_of(self.rows[place]) for place in places]
        replaced: list[Tensor] = []
        training, student = student.training, student.eval()
        try:
            made: list[list[int]] = []
            for start in range(0, len(prompts), self.spec.batch_size):
                batch = prompts[start : start + self.spec.batch_size]
                made += continue_prompts(
                    batch,
                    [student, self.teacher][: 1 + self._interleaved],
                    self._choose(generator, replaced),
                    ends=self.ends,
                    limits=[self._limit(prompt) for prompt in batch],
                )
        finally:
            student.train(training)
        rows = [
            answered(self.rows[place], prompt, response)
            for place, prompt, response in zip(places, prompts, made, strict=True)
        ]
        return Sampled(rows, sum(map(len, made)), int(sum(map(int, replaced))))

    @property
    def _interleaved(self) -> bool:
        return self.spec.policy == "interleaved"

    @property
    def _temperatures(self) -> list[float]:
        """Of each model that is asked."""
        own, theirs = self.spec.temperature, self.spec.teacher_temperature
        return [own, own if theirs is None else theirs][: 1 + self._interleaved]

    def _limit(self, prompt: Sequence[int]) -> int:
        """The last token of a row is only predicted, so a row of T positions has T + 1 tokens."""
        return max(1, min(self.spec.max_new_tokens, self.positions + 1 - len(prompt)))

    def _choose(
        self, generator: torch.Generator, replaced: list[Tensor]
    ) -> Callable[[list[Tensor]], Tensor]:
        """Of classes that both models have; counts of the teacher's tokens go to ``replaced``."""

        def choose(logits: list[Tensor]) -> Tensor:
            shared = [each[:, : self.classes].float() for each in logits]
            tokens = [
                pick(each, temperature, generator, self.spec.top_p)
                for each, temperature in zip(shared, self._temperatures, strict=True)
            ]
            if not self._interleaved:
                return tokens[0]
            proposed, own = tokens
            likely = among_best(shared[1], proposed, self.spec.top_k)
            replaced.append((~likely).sum())
            return torch.where(likely, proposed, own)

        return choose


def among_best(logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """[R] bool, whether each token [R] is one of the k likeliest; a tie at the k-th place is in."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1]
    return logits.gather(-1, tokens[:, None])[:, 0] >= least


def prompt_of(row: Row) -> list[int]:
    """The tokens before a row's last response, which is the last run of its mask."""
    learned = row.mask.tolist()
    last = len(learned) - 1 - learned[::-1].index(True)
    first = next((t + 1 for t in range(last, -1, -1) if not learned[t]), 0)
    tokens: list[int] = row.inputs["input_ids"][: first + 1].tolist()
    return tokens


def answered(row: Row, prompt: Sequence[int], response: Sequence[int]) -> Row:
    """A row of its prompt and another response, of which every token is learned, and it alone."""
    ids = torch.tensor([*prompt, *response])
    inputs: Mapping[str, Tensor] = {
        "input_ids": ids[:-1],
        "attention_mask": torch.ones_like(ids[:-1]),
    }
    mask = torch.arange(len(ids) - 1) >= len(prompt) - 1
    kept = {name: inputs[name] for name in row.inputs}
    return replace(row, inputs=kept, labels=ids[1:], mask=mask)
