"""On-policy responses, which the current student samples during training in place of the data's.

    student      y_t ~ student(. | x, y_<t)                            GKD, arXiv 2306.13649
    interleaved  the same, but a y_t outside the teacher's top_k
                 is replaced by a y_t ~ teacher(. | x, y_<t)             SKD, arXiv 2410.11325
    mixed        y_t ~ a teacher(. | x, y_<t) + (1 - a) student(. | x, y_<t)
                                                                      MiniLLM, arXiv 2306.08543

With ``interleaved`` each model has its own temperature; both are truncated at top_p, and the top_k
are taken before that truncation.

The loss on these rows is the usual one; no gradient flows through the sampling. The policies are
not plugins, since components do not have access to what they need: both models, during training,
with a cache each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from kdcore.data.responses.continuation import continue_prompts, pick
from kdcore.data.responses.endpoint.sampler import ServedSampler
from kdcore.decoding.sampling import draw
from kdcore.errors import UserError
from kdcore.method.generators import generator_at
from kdcore.method.records import Row
from kdcore.models.facts import describe_model, end_ids
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.on_policy import OnPolicySpec

_EXTENDED = {"input_ids", "attention_mask"}


@dataclass(frozen=True, slots=True)
class Sampled:
    """Rows with sampled responses.

    Attributes:
        rows: The rows.
        tokens: Number of sampled tokens.
        replaced: Number of these that come from the teacher.
        lag: Number of optimizer steps by which the weights of a server that sampled them are older
            than the student's; None without a server.
    """

    rows: list[Row]
    tokens: int
    replaced: int
    lag: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        """What is logged of a step."""
        counts = {"rows": len(self.rows), "tokens": self.tokens, "replaced": self.replaced}
        return counts if self.lag is None else counts | {"lag": self.lag}


@dataclass(frozen=True)
class OnPolicy:
    """The policy that samples new responses for rows.

    Attributes:
        spec: The settings of the policy.
        rows: The rows of the data.
        teacher: The teacher in eval mode, which the policy ``student`` does not run; None if it is
            not on this machine.
        ends: Token ids that end a response.
        classes: Number V of classes that both models share.
        positions: Maximum number of positions of a row.
        sampler: The server that samples; None if this process does.

    Raises:
        UserError: The rows have inputs other than tokens.
    """

    spec: OnPolicySpec
    rows: Sequence[Row]
    teacher: Any
    ends: Sequence[int]
    classes: int
    positions: int
    sampler: ServedSampler | None = None

    @classmethod
    def of(
        cls,
        spec: DistillSpec,
        models: TeacherAndStudent,
        rows: Sequence[Row],
        sampler: ServedSampler | None,
    ) -> Self | None:
        """The policy of a run.

        Args:
            spec: The spec.
            models: The models of the run.
            rows: The rows of the data.
            sampler: The server that samples, if there is one.

        Returns:
            The policy; None if the spec does not have one.

        Raises:
            UserError: The rows have inputs other than tokens.
        """
        asked, teacher = spec.data.on_policy, models.teacher
        if asked is None:
            return None
        local = [model for model in (teacher, models.student) if model is not None]
        contexts = [describe_model(model).context for model in local]
        positions = min(spec.data.max_length, *(c for c in contexts if c is not None))
        ends = end_ids(replace(models.first, model=models.student.model))
        frozen = teacher and teacher.model
        return cls(asked, rows, frozen, ends, models.classes, positions, sampler)

    def __post_init__(self) -> None:
        for name in self.rows[0].inputs.keys() - _EXTENDED:
            raise UserError(
                f"the rows have an input '{name}', which a sampled response cannot have",
                "use a source whose rows contain tokens only, or remove data.on_policy",
            )

    def __call__(
        self, student: Any, places: Sequence[int], generator: torch.Generator, step: int = 0
    ) -> Sampled:
        """Sample responses from the current student.

        Args:
            student: The student in any mode, which is restored afterwards.
            places: Indices of the rows.
            generator: Generator on the student's device.
            step: Number of the optimizer step.

        Returns:
            The rows with their new responses.
        """
        prompts = [prompt_of(self.rows[place]) for place in places]
        replaced: list[Tensor] = []
        training, student = student.training, student.eval()
        try:
            made = self._responses(student, prompts, generator, step, replaced)
        finally:
            student.train(training)
        rows = [
            answered(self.rows[place], prompt, response)
            for place, prompt, response in zip(places, prompts, made, strict=True)
        ]
        lag = self.sampler.lag(step) if self.sampler else None
        count = int(torch.stack(replaced).sum()) if replaced else 0
        return Sampled(rows, sum(map(len, made)), count, lag)

    def none_sampled(self) -> Sampled:
        """What a step samples that trains on the responses of the data."""
        return Sampled([], tokens=0, replaced=0, lag=0 if self.sampler else None)

    def _responses(
        self,
        student: Any,
        prompts: Sequence[Sequence[int]],
        generator: torch.Generator,
        step: int,
        replaced: list[Tensor],
    ) -> list[list[int]]:
        """New tokens for each prompt; the counts of replaced ones are added to ``replaced``."""
        limits = [self._limit(prompt) for prompt in prompts]
        if self.sampler is not None:
            return self.sampler.responses(
                student, prompts, limits, self.ends, step=step, generator=generator
            )
        made: list[list[int]] = []
        for start in range(0, len(prompts), self.spec.batch_size):
            batch = slice(start, start + self.spec.batch_size)
            made += continue_prompts(
                prompts[batch],
                [student, self.teacher][: 1 + self.spec.reads_teacher],
                self._choose(generator, replaced),
                ends=self.ends,
                limits=limits[batch],
            )
        return made

    def samples_at(self, step: int, seed: int) -> bool:
        """Whether a step trains on the student's responses, in all processes alike.

        Args:
            step: Number of the optimizer step.
            seed: Seed of the run.

        Returns:
            True with the probability of the policy.
        """
        chance = torch.rand((), generator=generator_at("cpu", seed, step, "on policy"))
        return bool(chance < self.spec.probability)

    @property
    def _temperatures(self) -> list[float]:
        """The temperature of each model."""
        own, theirs = self.spec.temperature, self.spec.teacher_temperature
        return [own, own if theirs is None else theirs][: 1 + self.spec.reads_teacher]

    def _limit(self, prompt: Sequence[int]) -> int:
        """The maximum response length; a row of T positions has T + 1 tokens, the last a label."""
        return max(1, min(self.spec.max_new_tokens, self.positions + 1 - len(prompt)))

    def _choose(
        self, generator: torch.Generator, replaced: list[Tensor]
    ) -> Callable[[list[Tensor]], Tensor]:
        """The token choice over the shared classes; it adds replacement counts to ``replaced``."""

        def choose(logits: list[Tensor]) -> Tensor:
            shared = [each[:, : self.classes].float() for each in logits]
            if self.spec.policy == "mixed":
                share = self.spec.teacher_share
                own, theirs = (each.softmax(-1) for each in shared)
                return draw((1 - share) * own + share * theirs, generator)
            tokens = [
                pick(each, temperature, generator, self.spec.top_p)
                for each, temperature in zip(shared, self._temperatures, strict=True)
            ]
            if self.spec.policy == "student":
                return tokens[0]
            proposed, own = tokens
            likely = among_best(shared[1], proposed, self.spec.top_k)
            replaced.append((~likely).sum())
            return torch.where(likely, proposed, own)

        return choose


def among_best(logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """Whether tokens are among the k most likely; a tie with the k-th counts as among them.

    Args:
        logits: [R, V] logits.
        tokens: [R] token ids.
        k: Number of tokens.

    Returns:
        [R] bool.
    """
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1]
    return logits.gather(-1, tokens[:, None])[:, 0] >= least


def prompt_of(row: Row) -> list[int]:
    """The tokens before a row's last response: the last contiguous run of its mask."""
    tokens: list[int] = row.inputs["input_ids"][: _last_run(row).start + 1].tolist()
    return tokens


def last_response(row: Row) -> list[int]:
    """The tokens of a row's last response, with its end token."""
    tokens: list[int] = row.labels[_last_run(row)].tolist()
    return tokens


def _last_run(row: Row) -> slice:
    learned = row.mask.tolist()
    last = len(learned) - 1 - learned[::-1].index(True)
    first = next((t + 1 for t in range(last, -1, -1) if not learned[t]), 0)
    return slice(first, last + 1)


def answered(row: Row, prompt: Sequence[int], response: Sequence[int]) -> Row:
    """A row with another response, whose tokens are the learned ones.

    Args:
        row: The original row.
        prompt: Token ids before the response.
        response: Token ids of the response.

    Returns:
        The new row, with the id of the original.
    """
    ids = torch.tensor([*prompt, *response])
    inputs: Mapping[str, Tensor] = {
        "input_ids": ids[:-1],
        "attention_mask": torch.ones_like(ids[:-1]),
    }
    mask = torch.arange(len(ids) - 1) >= len(prompt) - 1
    kept = {name: inputs[name] for name in row.inputs}
    return replace(row, inputs=kept, labels=ids[1:], mask=mask)
