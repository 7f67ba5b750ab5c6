"""The conformance suite of baselines, which decode a tiny Llama."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.components.construction import BuildContext
from kdcore.decoding.baseline import DecodedBatch, DecodingSettings
from kdcore.models.loading.loaded import LoadedModel
from kdcore.testing.decoding import tiny_target
from kdcore.testing.decoding.tiny_target import PROMPTS
from kdcore.testing.suite import Suite

SETTINGS = DecodingSettings(
    batch_size=len(PROMPTS),
    longest_prompt=max(map(len, PROMPTS)),
    max_new_tokens=12,
    temperature=0.0,
    ends=(),
    threads=1,
)


class BaselineSuite(Suite):
    """The checks of a `Baseline`.

    Attributes:
        same: Minimum share of the greedy tokens before the first that differs from the target's
            own; below 1 for software that rounds.
    """

    kind = "baseline"
    same: float = 1.0

    def bound(self, **settings: Any) -> Any:
        """Build a new baseline, bind it to a target, and start it."""
        baseline = self.component()
        baseline.bind(self.target())
        baseline.start(replace(SETTINGS, **settings))
        return baseline

    def target(self) -> LoadedModel:
        """Return the target."""
        return LoadedModel(tiny_target.target(), tiny_target.tokenizer(), "tiny", "tiny_target")

    def context(self) -> BuildContext:
        """Return a build context in which every model is the target's likeness."""
        return tiny_target.Offline(self._registry)

    def test_greedy_answers_are_the_targets(self) -> None:
        """Each answer is that of its prompt, in the order of the prompts."""
        found = self._decoded(self.bound())
        count = SETTINGS.max_new_tokens
        expected = [list(tiny_target.following(tuple(each), count)) for each in PROMPTS]
        assert found.answers is not None
        for answer, own in zip(found.answers, expected, strict=True):
            assert len(answer) == len(own), f"{len(answer)} new tokens instead of {len(own)}"
            kept = sum(answer[: n + 1] == own[: n + 1] for n in range(len(own)))
            assert kept >= self.same * len(own), f"{answer} instead of {own}"

    def test_an_answer_ends_with_its_end_token(self) -> None:
        """The end token is the answer's last one; tokens are counted with it."""
        first = self._decoded(self.bound()).answers
        assert first is not None
        end = first[0][2]
        found = self._decoded(self.bound(ends=(end,)))
        assert found.answers is not None
        expected = [[*row[: row.index(end)], end] if end in row else row for row in first]
        assert found.answers == expected, f"{found.answers} instead of {expected}"
        assert found.tokens == sum(map(len, expected)), f"counted {found.tokens} tokens"

    def test_sampling_follows_the_seed(self) -> None:
        """The same seed gives the same answers, other seeds other ones."""
        baseline = self.bound(temperature=1.0, max_new_tokens=16)
        first, again, other = (self._decoded(baseline, seed).answers for seed in (1, 1, 7))
        assert first == again, "the same seed gave other answers"
        assert first != other, "two seeds gave the same answers"

    def test_other_settings_hold_after_a_start(self) -> None:
        """A baseline is started for each group of batches."""
        baseline = self.bound()
        baseline.start(replace(SETTINGS, max_new_tokens=3, threads=2))
        found = self._decoded(baseline)
        assert found.tokens == 3 * len(PROMPTS), f"{found.tokens} tokens"

    def test_a_second_batch_does_not_see_the_first(self) -> None:
        """The answers depend on the prompts and the seed only."""
        baseline = self.bound()
        first, again = (self._decoded(baseline) for _ in range(2))
        assert first.answers == again.answers, "the second batch has other answers"

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Decode the prompts."""
        component.bind(self.target())
        component.start(SETTINGS)
        found = self._decoded(component)
        assert found.answers is not None
        return [torch.tensor(answer) for answer in found.answers]

    def _decoded(self, baseline: Any, seed: int = 0) -> DecodedBatch:
        found: DecodedBatch = baseline.decode([list(prompt) for prompt in PROMPTS], seed)
        return found
